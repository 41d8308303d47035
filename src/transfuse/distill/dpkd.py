"""DPKD: the teacher's token is preferred to the student's own."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.teacher import same_classes
from transfuse.distill.base import Distillation
from transfuse.distill.on_policy import written
from transfuse.losses import Divergence, Term, cross_entropy, match, preference, token_margin
from transfuse.losses.match import label_entropy
from transfuse.losses.preference import Shape

EXTRA = "pretraining"


class DPKD(Distillation):
    """Prefer the teacher's most likely token to the student's, with the teacher as the reference.

        h = (log s[a] - log s[c]) - (log t[a] - log t[c]),  a = argmax t, c = argmax s
        loss = (1 - alpha) * CE(label, student) + alpha * -log sigmoid(beta * h)

    This is the form of the authors' code, token by token. `level="sequence"` is the paper's equation, on an answer y_t
    that the teacher writes to each prompt and an answer y_s of the student, written anew whenever a prompt is read:

        h = log s(y_t) / t(y_t) - log s(y_s) / t(y_s)

    Of tokens, h is at most 0, and 0 where both would say the same: there the preference teaches nothing, so labels
    are needed beside it. Only the logits of a and c move. A second stream named `"pretraining"`, plain text, keeps
    the student a language model: its loss, `(1 - alpha) * CE(label, student) + alpha * CE(teacher, student)`, is
    added with the weight `plain`. The student starts from one tuned on labels: `Then(Labels(), DPKD())`, or a trained
    target.

    Args:
        alpha: weight of the preference, in [0, 1).
        beta: how sharp the preference is.
        label_smoothing: share of preferences that are taken to be wrong, in [0, 0.5).
        reference: False leaves the teacher's own preference out of h.
        shape: `"sigmoid"`, or `"squared"` for `(h - 1 / (2 beta))**2`.
        positive: weight of a penalty where the teacher's token is less likely to the student than to the teacher.
        plain: weight of the second stream's loss.
        level: `"token"` or `"sequence"`; `label_smoothing` and `shape` serve both, `reference` and `positive` tokens.
        per_token: divide each answer's log-ratio by its length; for sequences.
        prompt, length, end: for sequences, as for :class:`~transfuse.distill.GKD`.

    Raises:
        InputError: an argument is out of its range, or the data has no labels.
        VocabularyError: teacher and student count different classes.

    Source: Li, Gu, Dong, Wang, Cheng & Wei, 2024, arXiv:2406.19774.
    """

    card = Card(
        paper="Li, Gu, Dong, Wang, Cheng & Wei, 2024",
        arxiv="2406.19774",
        sheet=55,
        carries="outputs",
        teacher="full",
        data="labelled",
        tasks=("language-model",),
    )

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        reference: bool = True,
        shape: Shape = "sigmoid",
        positive: float = 0.0,
        plain: float = 0.5,
        level: Literal["token", "sequence"] = "token",
        per_token: bool = False,
        prompt: int = 8,
        length: int | None = None,
        end: int | None = None,
    ):
        super().__init__()
        if not 0 <= alpha < 1:
            raise InputError(f"DPKD: alpha is {alpha}, it must be in [0, 1): the preference alone teaches too little")
        if not beta > 0 or not 0 <= label_smoothing < 0.5:
            raise InputError(
                f"DPKD: beta is {beta}, it must be positive; label_smoothing is {label_smoothing}, it is in [0, 0.5)"
            )
        if shape not in ("sigmoid", "squared") or positive < 0 or plain < 0:
            raise InputError("DPKD: shape is 'sigmoid' or 'squared', positive and plain must not be negative")
        if level not in ("token", "sequence"):
            raise InputError(f"DPKD: level is {level!r}, it must be 'token' or 'sequence'")
        if level == "sequence" and (not reference or positive):
            raise InputError("DPKD: reference=False and positive are for level='token'")
        if prompt < 1 or (length is not None and length < 1):
            raise InputError(f"DPKD: prompt is {prompt} and length {length}, both must be at least 1")
        self.alpha, self.beta, self.label_smoothing, self.reference = alpha, beta, label_smoothing, reference
        self.shape, self.positive, self.plain = shape, positive, plain
        self.level, self.per_token, self.prompt, self.length, self.end = level, per_token, prompt, length, end

    def build(self, student: Outputs, teacher: Outputs) -> None:
        same_classes(student.scores, teacher.scores)

    def stage(self, i: int, run: Run) -> Stage:
        stage = super().stage(i, run)
        more = {EXTRA: run.data[EXTRA]} if EXTRA in run.data else {}
        if not more and self.level == "token":
            return stage
        return Stage({**stage.streams, **more}, [Phase("student", self._all, stage.trained[0].params)])

    def _all(self, batches: Batches, run: Run) -> Losses:
        """The losses of the batch, and those of what else there is: whole sequences, plain text."""
        terms = self.losses(batches, run)
        if self.level == "sequence":
            terms = {**terms, "preference": self._sequences(batches["data"], run)}
        return {**terms, **self._plain(batches[EXTRA], run)} if EXTRA in batches else terms

    def _sequences(self, batch: Batch, run: Run) -> Term:
        chosen, rejected = (self._log_ratio(role, batch, run) for role in ("source", "target"))
        values = preference(chosen - rejected, beta=self.beta, label_smoothing=self.label_smoothing, shape=self.shape)
        return self.alpha * Term.of(values)

    def _log_ratio(self, writer: str, batch: Batch, run: Run) -> Tensor:
        """log s(y) / t(y) of the answers that a model writes, `(batch,)`."""
        answers = written(writer, batch, run, self.prompt, self.length, self.end)
        student, teacher = self._shared(run("target", answers), self._teacher(answers, run), answers, run)
        ratio = label_entropy(teacher.learning, answers.labels) - label_entropy(student.learning, answers.labels)
        return ratio.sum(1) / (answers.mask.sum(1) if self.per_token else 1)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        if batch.labels is None or batch.mask is None:
            raise InputError("DPKD needs labels beside its preference, and this data has none")
        if self.level == "sequence":  # the preference is about other texts
            return {"labels": (1 - self.alpha) * Term.of(label_entropy(student.learning, batch.labels), batch.mask)}
        ours = student.logits_at(batch.mask)
        margin = token_margin(ours, teacher.logits_at(batch.mask), reference=self.reference, positive=self.positive)
        values = preference(margin, beta=self.beta, label_smoothing=self.label_smoothing, shape=self.shape)
        hard, count = cross_entropy(ours, batch.labels[batch.mask]), float(len(ours))
        return {
            "preference": self.alpha * Term(values.sum(), count, "token"),
            "labels": (1 - self.alpha) * Term(hard.sum(), count, "token"),
        }

    def _plain(self, batch: Batch, run: Run) -> Losses:
        """The second stream: labels and the teacher's whole distribution."""
        student, teacher = self._shared(run("target", batch), self._teacher(batch, run), batch, run)
        values, hard = match(
            student.learning,
            teacher.scores,
            Divergence("interpolated", 1.0),  # all the way to the teacher: its cross-entropy
            labels=batch.labels,
            rows=batch.mask,
            expect=(self.alpha, 1 - self.alpha),
        )
        assert hard is not None
        unit = f"{EXTRA}/token"
        return {
            "plain": self.plain * self.alpha * Term.of(values, batch.mask, unit),
            "plain labels": self.plain * (1 - self.alpha) * Term.of(hard, batch.mask, unit),
        }

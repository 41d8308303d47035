"""MiniLLM: reverse KL of whole answers by policy gradient, with three means against its variance."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.labels import labels_term
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.teacher import same_classes
from transfuse.distill.base import Distillation
from transfuse.distill.on_policy import answered, prompts, room
from transfuse.losses import Divergence, Term, label_entropy, match


class MiniLLM(Distillation):
    """Bring whole answers of the student to where the teacher finds them likely; text of the data keeps it in language.

    Answers y are drawn, token by token, from p~ = mix * teacher + (1 - mix) * student. With p and q the probabilities
    that teacher and student give to the drawn tokens, and r = log p - log q, the gradient is that of

        loss = mean over tokens of  w_t * (KL(q_t || p_t) - R_{t+1} * log q(y_t))  +  labels * CE(data)

        w_t = q(y_t) / p~(y_t)                 importance of one token, not of all before it
        R_{t+1} = mean of r over the tokens after t              normalised by length; 0 for the last one

    in which w and R are constants. The first part is the single step, whose expectation over the vocabulary is taken
    exactly; the second is how a token changes what comes after it. Every answer is used for one update, so the ratio to
    the policy that wrote it is 1 and the paper's clipping of it, for several, has nothing to clip. The student should
    have been trained on labels before: what an untrained one writes teaches nothing.

    `data=` gives prompts, and is the text of the last term as well unless the data has a second stream: `data={"data":
    prompts, "pretrain": text}`.

    Args:
        mix: share of the teacher in the distribution that answers are drawn from, in [0, 1).
        labels: weight of the cross-entropy on text.
        normalised: divide R by the number of tokens it sums; off, long answers are punished.
        temperature, prompt, length, end: of the writing, as for :class:`~transfuse.distill.gkd.GKD`.

    Raises:
        InputError: an argument is out of its range, or prompts leave nothing to write.
        VocabularyError: teacher and student count different classes.

    Source: Gu, Dong, Wei & Huang, ICLR 2024, arXiv:2306.08543.
    """

    card = Card(
        paper="Gu, Dong, Wei & Huang, ICLR 2024",
        arxiv="2306.08543",
        carries="outputs",
        teacher="full",
        data="unlabelled",
        tasks=("language-model",),
    )

    def __init__(
        self,
        mix: float = 0.2,
        labels: float = 1.0,
        normalised: bool = True,
        temperature: float = 1.0,
        prompt: int = 8,
        length: int | None = None,
        end: int | None = None,
    ):
        super().__init__()
        if not 0 <= mix < 1 or labels < 0:
            raise InputError(f"MiniLLM: mix is {mix}, it must be in [0, 1), and labels {labels} not negative")
        if temperature <= 0 or prompt < 1 or (length is not None and length < 1):
            raise InputError("MiniLLM: temperature must be positive, prompt and length at least 1")
        self.mix, self.labels, self.normalised = mix, labels, normalised
        self._mix = mix
        self.temperature, self.prompt, self.length, self.end = temperature, prompt, length, end

    def build(self, student: Outputs, teacher: Outputs) -> None:
        same_classes(student.scores, teacher.scores)

    def stage(self, i: int, run: Run) -> Stage:
        if not {"data"} <= run.data.keys() <= {"data", "pretrain"}:
            raise InputError(f"MiniLLM reads 'data' and perhaps 'pretrain', found {', '.join(run.data)}")
        return Stage(dict(run.data), [Phase("student", self.losses, run["target"].parameters())])

    def losses(self, batches: Batches, run: Run) -> Losses:
        batch = self.answers(batches["data"], run)
        terms = self.loss(*self._shared(run("target", batch), self._teacher(batch, run), batch, run), batch, run.clock)
        if self.labels:
            text, unit = batches.get("pretrain"), "pretrain/labelled"
            if text is None:
                text, unit = batches["data"], "labelled"
            terms["labels"] = self.labels * labels_term(run("target", text).learning, text, unit)
        return terms

    def answers(self, batch: Batch, run: Run) -> Batch:
        """The batch's prompts with answers drawn from teacher and student together."""
        self._mix = 0.0 if run.shuffled else self.mix  # the control arm must not hear the teacher's words
        asked, mask = prompts(batch, self.prompt)
        options = {"new_tokens": room(batch, mask, self.length), "temperature": self.temperature, "end": self.end}
        real = None if bool(mask.all()) else mask
        if not self._mix:
            return answered(run.generate("target", asked, real, **options), mask, self.end)
        texts = run.generate(
            ("target", "source"), asked, real, fuse=lambda logits: _mixed(logits, self._mix), **options
        )
        return answered(texts, mask, self.end)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        divergence, entropy = match(
            student.learning, teacher.scores, Divergence("reverse"), labels=batch.labels, rows=batch.mask
        )
        assert entropy is not None
        with torch.no_grad():
            ours, theirs = -entropy, -label_entropy(teacher.learning, batch.labels)
            # w = q / (mix p + (1 - mix) q), from the difference of logarithms alone.
            weight = 1 / (self._mix * (theirs - ours).exp() + 1 - self._mix)
            future = later(torch.where(batch.mask, theirs - ours, 0), batch.mask, self.normalised)
        values = weight * (divergence + future * entropy)
        return {"minillm": Term.of(values, batch.mask, "late:token")}


def later(rewards: Tensor, mask: Tensor, normalised: bool = True) -> Tensor:
    """The sum of what comes after each position, or its mean; 0 where nothing does.

    Args:
        rewards: `(batch, tokens)`, 0 where the mask is false.
    """
    after = rewards.flip(1).cumsum(1).flip(1) - rewards
    if not normalised:
        return after
    count = mask.long().flip(1).cumsum(1).flip(1) - mask.long()
    return torch.where(count > 0, after / count.clamp(min=1), 0)


def _mixed(logits: list[Tensor], mix: float) -> Tensor:
    """Logarithms of the mixture of student and teacher; what only one of them knows has no share of the other."""
    width = min(part.shape[-1] for part in logits)
    ours, theirs = (part[..., :width].log_softmax(-1) for part in logits)
    shares = torch.tensor([1 - mix, mix], device=ours.device).log()
    return torch.logaddexp(ours + shares[0], theirs + shares[1])

"""Self-Evolution KD: hard tokens are taught with a part of the answer in the student's own distribution."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.core.teacher import same_classes
from transfuse.distill.base import Distillation
from transfuse.losses import Term, cross_entropy

EXCLUDED = -1e30
"""In the place of log 0, whose differences are no numbers."""


class SelfEvolution(Distillation):
    """Match a blend of labels and teacher, and help the student where that is hard.

        q = blend * onehot(label) + (1 - blend) * teacher
        d = KL(q || student),  hard where d > threshold
        g = most * (1 - exp(-d)) for hard tokens, 0 for others
        p = (1 - g) * student + g * q
        loss = KL(q || p) + labels * CE(label, student)

    No gradient flows through q, d or g, nor through the q inside p. So this is a skewed KL whose skew follows the
    difficulty of each token; in logits it damps the pull of hard tokens, and lets go as the student improves. Read the
    other way, with p as a constant target, the loss is KL(p || student): `proxy="target"`.

    Args:
        blend: share of the label in q, in [0, 1].
        most: upper bound of g, in [0, 1).
        threshold: difficulty in nats above which a token is hard; None takes the mean over the micro-batch.
        proxy: where p stands: `"student"` or `"target"`.
        labels: weight of the cross-entropy; q holds the labels already.

    Raises:
        InputError: an argument is out of its range, or the data has no labels.
        VocabularyError: teacher and student count different classes.

    Source: Song, Ding, Zan & Huang, COLING 2025, arXiv:2412.15303. The two stages are the paper's; the forms of g, the
    threshold and the defaults are this library's, for no equations could be checked.
    """

    card = Card(
        paper="Song, Ding, Zan & Huang, COLING 2025",
        arxiv="2412.15303",
        sheet=60,
        carries="outputs",
        teacher="full",
        data="labelled",
        tasks=("language-model",),
    )

    def __init__(
        self,
        blend: float = 0.5,
        most: float = 0.5,
        threshold: float | None = None,
        proxy: Literal["student", "target"] = "student",
        labels: float = 0.0,
    ):
        super().__init__()
        if not 0 <= blend <= 1:
            raise InputError(f"SelfEvolution: blend is {blend}, it must be between 0 (teacher) and 1 (labels)")
        if not 0 <= most < 1:
            raise InputError(f"SelfEvolution: most is {most}, it must be in [0, 1): at 1 nothing is learned")
        if proxy not in ("student", "target"):
            raise InputError(f"SelfEvolution: proxy is {proxy!r}, it must be 'student' or 'target'")
        if labels < 0 or (threshold is not None and threshold < 0):
            raise InputError("SelfEvolution: labels and threshold must not be negative")
        self.blend, self.most, self.threshold, self.proxy, self.labels = blend, most, threshold, proxy, labels

    def build(self, student: Outputs, teacher: Outputs) -> None:
        same_classes(student.scores, teacher.scores)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        if batch.labels is None or batch.mask is None:
            raise InputError("SelfEvolution blends labels into its target, and this data has none")
        labels = batch.labels[batch.mask]
        logits = student.logits_at(batch.mask)
        log_s = logits.log_softmax(-1).clamp(min=EXCLUDED)
        log_q = self.target(teacher.logits_at(batch.mask), labels)
        _, prior = self.difficulty(log_s, log_q)
        log_p = torch.logaddexp((1 - prior).log()[:, None] + log_s, prior.log()[:, None] + log_q)
        values = divergence(log_q, log_p) if self.proxy == "student" else divergence(log_p.detach(), log_s)
        terms = {"evolution": Term(values.sum(), float(len(labels)), "token")}
        if self.labels:
            terms["labels"] = self.labels * Term(cross_entropy(logits, labels).sum(), float(len(labels)), "token")
        return terms

    @torch.no_grad()
    def target(self, teacher: Tensor, labels: Tensor) -> Tensor:
        """log q of logits `(rows, classes)` and labels `(rows,)`."""
        q = (1 - self.blend) * teacher.softmax(-1)
        return q.scatter_add_(-1, labels[:, None], torch.full_like(q[:, :1], self.blend)).log().clamp(min=EXCLUDED)

    @torch.no_grad()
    def difficulty(self, log_s: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Difficulty d and prior ratio g of each row, from log-probabilities `(rows, classes)`."""
        d = divergence(log_q, log_s)
        hard = d > (d.mean() if self.threshold is None else self.threshold)
        return d, torch.where(hard, self.most * (1 - (-d).exp()), 0.0)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities, `(rows,)`; classes that p excludes add nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)

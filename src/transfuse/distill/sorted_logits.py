"""SortedLogitsKD: teacher and student with different tokenizers agree on how sure they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from transfuse.core.batch import Batch, real_tokens
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.distill.base import Distillation
from transfuse.distill.byte_span import scored_tokens
from transfuse.losses import IGNORE, Term
from transfuse.losses.alignment import sorted_distance
from transfuse.losses.match import label_entropy
from transfuse.losses.reduction import next_token


class SortedLogitsKD(Distillation):
    """Match the teacher's probabilities sorted by size, whatever tokens they belong to.

        loss = CE(labels, student) + weight * sum_i |p_(i) - q_(i)|

    p_(i) and q_(i) are the i-th largest probabilities of teacher and student; the smaller vocabulary is filled up with
    zeros. This is the Wasserstein distance between the two where every move costs the same. The k-th scored position
    of the student is compared with the k-th of the teacher, and what is left over of the longer text with nothing: the
    two say more and more about different places, the longer the text. Nothing tells which token is likely, so labels
    always take part.

    Batches hold both readings of the text, see :func:`transfuse.datasets.paired_tokens`; without a `source` both
    sides read the same tokens.

    Args:
        weight: of the distance; the authors use 1.5.

    Raises:
        InputError: the weight is not positive.

    Source: Boizard, El Haddad, Hudelot & Colombo, TMLR 2025, arXiv:2402.12030 (universal logit distillation).
    """

    card = Card(
        paper="Boizard, El Haddad, Hudelot & Colombo, TMLR 2025",
        arxiv="2402.12030",
        carries="outputs",
        teacher="full",
        data="unlabelled",
        tasks=("language-model",),
    )
    reads_apart = True
    units: Mapping[str, Callable[[Batch], float | Tensor]] = {"pair": lambda batch: _counts(batch).sum()}

    def __init__(self, weight: float = 1.5):
        super().__init__()
        if not weight > 0:
            raise InputError(f"SortedLogitsKD: weight is {weight}, it must be positive")
        self.weight = weight

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        counts = _counts(batch)[:, None]
        ours, theirs = (
            logits[mask & (mask.cumsum(1) <= counts)]
            for logits, mask in zip((student.logits, teacher.logits), _scored(batch), strict=True)
        )
        entropy = label_entropy(student.learning, batch.labels)
        return {
            "labels": Term.of(entropy, batch.labels != IGNORE, "labelled"),
            "sorted": self.weight * Term.of(sorted_distance(ours, theirs), unit="pair"),
        }


def _scored(batch: Batch) -> tuple[Tensor, Tensor]:
    """The scored positions of both sides, `(batch, tokens)` each."""
    other = batch.for_source()
    ours = scored_tokens(batch)
    return ours, ours if other is batch else next_token(real_tokens(other).long()) == 1


def _counts(batch: Batch) -> Tensor:
    """How many positions of each text are compared, `(batch,)`."""
    ours, theirs = _scored(batch)
    return torch.minimum(ours.sum(1), theirs.sum(1))

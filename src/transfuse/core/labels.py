"""The term that every family teaches labels by."""

from __future__ import annotations

from torch import Tensor

from transfuse.core.batch import Batch
from transfuse.losses import IGNORE, Term, cross_entropy


def labels_term(logits: Tensor, batch: Batch, unit: str = "labelled") -> Term:
    """Cross-entropy on the samples or positions that have a label.

    Args:
        unit: what it counts; labels of another stream than the first are `"<stream>/labelled"`.
    """
    return Term.of(cross_entropy(logits, batch.labels), batch.labels != IGNORE, unit)

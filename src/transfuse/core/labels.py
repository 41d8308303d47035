"""The term that every family teaches labels by."""

from __future__ import annotations

from transfuse.core.batch import Batch
from transfuse.losses import IGNORE, Scores, Term, label_entropy


def labels_term(scores: Scores, batch: Batch, unit: str = "labelled") -> Term:
    """Cross-entropy on the samples or positions that have a label.

    Args:
        scores: logits, or a language model's before its output layer.
        unit: what it counts; labels of another stream than the first are `"<stream>/labelled"`.
    """
    return Term.of(label_entropy(scores, batch.labels), batch.labels != IGNORE, unit)

"""The terms by which a student learns from a teacher's distribution and from labels, in one pass."""

from __future__ import annotations

from transfuse.core.batch import Batch
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.losses import IGNORE, Divergence, Term, match


def teach(
    name: str, divergence: Divergence, student: Outputs, teacher: Outputs, batch: Batch, alpha: float = 1.0
) -> Losses:
    """`alpha` times a divergence from the teacher, and (1 - alpha) times the labels' cross-entropy.

    The divergence counts samples, or scored positions; the cross-entropy, where labels have a weight and the batch has
    any, those with a label. A language model's logits are never built, see :func:`transfuse.losses.match`.

    Args:
        name: of the divergence's term; the other is called `"labels"`.
        alpha: weight of the teacher, in [0, 1].
    """
    labels = batch.labels if alpha < 1 else None
    values, entropy = match(
        student.learning, teacher.scores, divergence, labels=labels, rows=batch.mask, expect=(alpha, 1 - alpha)
    )
    terms = {name: alpha * Term.of(values, batch.mask)}
    if labels is not None and entropy is not None:
        terms["labels"] = (1 - alpha) * Term.of(entropy, labels != IGNORE, "labelled")
    return terms

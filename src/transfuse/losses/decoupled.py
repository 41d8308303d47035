"""Losses that compare parts of the logits apart, so that the large ones do not drown the others.

One value per row, teacher and student of equal shape `(..., classes)`.
"""

from __future__ import annotations

from torch import Tensor

from transfuse.losses._inputs import at_least_float32, require_same_shape
from transfuse.losses.feature import unit


def top_k_decoupled(
    student: Tensor, teacher: Tensor, *, k: int = 3, alpha: float = 1.0, beta: float = 1.0, normalise: bool = False
) -> Tensor:
    """One minus the cosines of three groups of classes: the teacher's k largest logits, its k smallest, the rest.

        1 - (alpha * cos(k largest) + beta * cos(k smallest) + cos(rest)),  each cosine over the group's coordinates

    (Wang & Zhou, 2025, arXiv:2508.04539.) It does not depend on the scale of the student's logits. A group that
    is zero throughout on one side has cosine zero and receives no gradient.

    Args:
        student: logits, `(..., classes)`.
        teacher: logits of the same shape; they choose the groups.
        k: size of the outer groups.
        alpha, beta: weights of the k largest and of the k smallest.
        normalise: divide the sum of the cosines by the sum of the weights, so that the least value is zero rather
            than `-(alpha + beta)`.

    Returns:
        `(...)`, one value per row.

    Raises:
        ValueError: shapes differ; or a group would have fewer than two classes, which always agree or disagree whole.

    >>> import torch
    >>> logits = torch.tensor([[3.0, 2.0, 0.5, -0.5, -2.0, -3.0]])
    >>> top_k_decoupled(2 * logits, logits, k=2)  # 1 - (1 + 1 + 1)
    tensor([-2.])
    """
    require_same_shape(student, teacher)
    classes = student.shape[-1]
    if k < 2 or classes - 2 * k < 2:
        raise ValueError(
            f"k is {k} for {classes} classes: three groups of two or more need k from 2 to {(classes - 2) // 2}, "
            "and six classes at least"
        )
    order = teacher.argsort(dim=-1, descending=True, stable=True)
    cosines = [
        (unit(ours) * unit(theirs)).sum(-1)
        for ours, theirs in (
            (at_least_float32(student).gather(-1, group), at_least_float32(teacher).gather(-1, group))
            for group in (order[..., :k], order[..., -k:], order[..., k:-k])
        )
    ]
    similarity = alpha * cosines[0] + beta * cosines[1] + cosines[2]
    return 1 - (similarity / (alpha + beta + 1) if normalise else similarity)

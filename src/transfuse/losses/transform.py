"""What can be done to a teacher's logits before any loss compares a student with them.

A transform takes logits `(..., classes)` and gives logits of the same shape, so it stands in front of every loss
of :mod:`transfuse.losses.divergence`: `kl_divergence(student, top_k_scaling(teacher, labels))`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.losses._inputs import at_least_float32
from transfuse.losses.reduction import IGNORE


def top_k_scaling(
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    k: int = 3,
    growth: float = 0.5,
    correction: float = 1.5,
    shift: float = 0.1,
) -> Tensor:
    """Scale up the k largest logits of each row, and the true class where the teacher misses it (TopKD).

        z'_i = z_i * w_i + delta    for i among the k largest, or i = label  (z_i / w_i + delta where z_i < 0)
        z'_i = z_i                  otherwise
        w_i  = 1 + growth * (k - rank_i + 1) / k,  rank 1 for the largest
        w_y  = (1 + growth) * correction           for the label y of a row whose largest logit is another class
        delta = shift * (mean of the k largest - mean of the others)

    A weight above one would push a negative logit down, so those are divided by it. Equation of Wang & Zhou, 2025,
    arXiv:2508.04539; the values of the weights and of delta are this library's.

    Args:
        teacher: logits, `(..., classes)`.
        labels: `(...)`, -100 where there is none; None corrects no row.
        k: how many logits, fewer than there are classes.
        growth: by how much the largest logit is scaled up; the k-th by 1/k of it.
        correction: 1 gives a missed class no more than the largest weight.
        shift: of the scaled logits, as a share of their distance from the others.

    Raises:
        ValueError: k is not between 1 and the number of classes, or labels do not belong to the rows.

    >>> top_k_scaling(torch.tensor([[4.0, 1.0, 0.0, -1.0]]), k=2, shift=0)
    tensor([[ 6.0000,  1.2500,  0.0000, -1.0000]])
    """
    logits, top = _largest(teacher, k)
    ranks = torch.arange(k, 0, -1, device=logits.device, dtype=logits.dtype)
    weights = torch.ones_like(logits).scatter(-1, top, (1 + growth * ranks / k).expand(top.shape))
    scaled = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, top, True)
    inside = logits.gather(-1, top).sum(-1, keepdim=True)
    outside = logits.sum(-1, keepdim=True) - inside
    delta = shift * (inside / k - outside / (logits.shape[-1] - k))
    if labels is not None:
        if labels.shape != logits.shape[:-1]:
            raise ValueError(f"logits {tuple(teacher.shape)} need labels {tuple(logits.shape[:-1])}: one per row")
        missed = (labels != IGNORE) & (labels != top[..., 0])
        truth = torch.zeros_like(scaled).scatter(-1, labels.clamp(min=0).unsqueeze(-1), missed.unsqueeze(-1))
        weights = weights.masked_fill(truth, (1 + growth) * correction)
        scaled |= truth
    return torch.where(scaled, torch.where(logits < 0, logits / weights, logits * weights) + delta, logits)


def top_k_linspace(teacher: Tensor, *, k: int = 20) -> Tensor:
    """Multiply the k largest logits of each row by weights that fall straight from 2 for the largest to 1 for the k-th.

    The variant of :func:`top_k_scaling` without a shift and without regard to signs. A label would take the place
    of the k-th class, whose weight is 1, and so changes nothing: none is asked for.

    Args:
        teacher: logits, `(..., classes)`.
        k: how many logits, fewer than there are classes.

    Raises:
        ValueError: k is not between 1 and the number of classes.

    >>> top_k_linspace(torch.tensor([[4.0, 2.0, -1.0, -2.0]]), k=3)
    tensor([[ 8.,  3., -1., -2.]])
    """
    logits, top = _largest(teacher, k)
    weights = torch.linspace(2, 1, k, device=logits.device, dtype=logits.dtype)
    return logits * torch.ones_like(logits).scatter(-1, top, weights.expand(top.shape))


def _largest(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The logits in float32 at least, and the classes of the k largest of each row, the largest first."""
    if not 1 <= k < teacher.shape[-1]:
        raise ValueError(f"k must be between 1 and {teacher.shape[-1] - 1} for {teacher.shape[-1]} classes, found {k}")
    logits = at_least_float32(teacher)
    return logits, logits.topk(k, dim=-1).indices

"""Clustering of a batch by prototypes: balanced assignments and their prediction from another view."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def balanced_assignment(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Soft assignments of samples to clusters that are used equally (Sinkhorn-Knopp; Caron et al., 2020).

        Q = exp(scores / epsilon), then in turn columns to equal mass and rows to 1, `iterations` times

    Computed in the log domain, so that no exponential can overflow. It has no gradient.

    Args:
        scores: `(samples, clusters)`.
        epsilon: the smaller, the harder the assignments.
        iterations: after few of them columns are only nearly balanced.

    Returns:
        `(samples, clusters)`; rows add up to 1.

    Raises:
        ValueError: `scores` is no matrix with at least two clusters, or epsilon is not positive.
    """
    if scores.dim() != 2 or scores.shape[1] < 2 or epsilon <= 0:
        raise ValueError(
            f"assignments need scores (samples, clusters), two clusters or more, and epsilon > 0; found "
            f"{tuple(scores.shape)} and {epsilon}"
        )
    logs = scores / epsilon
    for _ in range(iterations):
        logs = logs - logs.logsumexp(0, keepdim=True)
        logs = logs - logs.logsumexp(1, keepdim=True)
    return logs.exp()


def gated_relation(
    student_known: Tensor, student_novel: Tensor, teacher_known: Tensor, temperature: float, detach_gate: bool = False
) -> Tensor:
    """What a teacher of the known classes says about samples of novel ones (Gu et al., ICCV 2023).

        a = softmax(teacher_known / T),   b = softmax(student_known / T)
        w = sum over known classes of softmax([student_known, student_novel] / T),   divided by its mean
        value = -T^2 w sum_c a_c log b_c

    So a sample that resembles known classes keeps more of its relation to them. The teacher has no gradient.

    Args:
        student_known, teacher_known: logits `(..., known)`.
        student_novel: logits `(..., novel)`; the leading axes (views, heads, samples) are those of the others, and
            the mean of the gate is over all of them.
        temperature: T.
        detach_gate: let no gradient flow through w.

    Returns:
        `(...)`.

    Raises:
        ValueError: student and teacher know different classes, or there is no sample.
    """
    if student_known.shape[-1] != teacher_known.shape[-1]:
        raise ValueError(f"student and teacher know {student_known.shape[-1]} and {teacher_known.shape[-1]} classes")
    if not student_known.numel():
        raise ValueError("there is no unlabelled sample in this batch, so no class relation to keep")
    teacher = (teacher_known.detach() / temperature).softmax(-1)
    cross = -(teacher * (student_known / temperature).log_softmax(-1)).sum(-1)
    everything = torch.cat([student_known, student_novel], -1) / temperature
    gate = everything.softmax(-1)[..., : student_known.shape[-1]].sum(-1)
    gate = gate / gate.mean()
    return temperature**2 * (gate.detach() if detach_gate else gate) * cross


def cosine_logits(features: Tensor, prototypes: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """`scale * cos(feature, prototype)` of features `(samples, width)` and prototypes `(prototypes, width)`."""
    return scale * F.normalize(features, dim=-1) @ F.normalize(prototypes, dim=-1).T

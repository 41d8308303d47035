"""Divergences from what was kept of a teacher's distribution; the target is never made dense."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.losses._inputs import at_least_float32
from transfuse.losses.scores import Sampled, TopK


def top_k_kl(student: Tensor, teacher: TopK) -> Tensor:
    """KL(teacher || student) over the k kept classes and one bucket that holds the rest of either side's mass.

    It is at most the KL over all classes, and 0 exactly where the student agrees on the kept classes.

    Args:
        student: logits `(..., classes)`; divided by the temperature that the target was kept at.

    Raises:
        ValueError: rows or classes differ.
    """
    log_s = _log_probabilities(student, teacher)
    log_t = teacher.log_probabilities.to(log_s.dtype)
    t = log_t.exp()
    chosen = log_s.gather(-1, teacher.ids)
    kept = torch.where(t > 0, t * (log_t - chosen), 0).sum(-1)
    chosen = chosen.masked_fill(t == 0, -torch.inf)
    rest_t, rest_s = (1 - t.sum(-1)).clamp(min=0), (1 - chosen.exp().sum(-1)).clamp(min=1e-7)
    return kept + torch.special.xlogy(rest_t, rest_t) - rest_t * rest_s.log()


def sampled_kl(student: Tensor, teacher: Sampled) -> Tensor:
    """KL of the drawn tokens' shares to the student; its expected gradient is that of KL(teacher || student).

    Its value is not: the shares' entropy is below the teacher's.
    (RS-KD: Anshumann et al., ACL 2025, arXiv:2503.16870.)

    Args:
        student: logits `(..., classes)`; divided by the temperature that the target was drawn at.

    Raises:
        ValueError: rows or classes differ.
    """
    log_s = _log_probabilities(student, teacher)
    shares = teacher.shares.to(log_s.dtype)
    chosen = log_s.gather(-1, teacher.ids)
    return torch.where(shares > 0, torch.special.xlogy(shares, shares) - shares * chosen, 0).sum(-1)


def _log_probabilities(student: Tensor, teacher: TopK | Sampled) -> Tensor:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's logits are {tuple(student.shape)}, the target is of {teacher.shape}: both must speak of "
            "the same tokens and the same vocabulary"
        )
    return (at_least_float32(student) / teacher.temperature).log_softmax(-1)

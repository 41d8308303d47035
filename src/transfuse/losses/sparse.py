"""Divergences from what was kept of a teacher's distribution; the target is never made dense."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from transfuse.losses._inputs import at_least_float32
from transfuse.losses.reduction import IGNORE
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


Rest = Literal["renormalised", "uniform", "label"]


def top_k_target(logits: Tensor, k: int, rest: Rest = "renormalised", labels: Tensor | None = None) -> Tensor:
    """What is often made of the k largest probabilities: a whole distribution, and a biased one.

    Kept as baselines; :func:`top_k_kl` needs no such guess, and :func:`sampled_kl` no large k.

    Args:
        logits: of the teacher, `(..., classes)`.
        k: how many are kept, fewer than the classes.
        rest: what becomes of the other mass: `"renormalised"`, the kept ones are scaled up to 1; `"uniform"`, it is
            spread over the other classes (TinyViT: Wu et al., 2022, arXiv:2207.10666); `"label"`, it goes to the label.
        labels: `(...)`, for `"label"`; without one (-100) a row is renormalised.

    Returns:
        Probabilities `(..., classes)`.

    Raises:
        ValueError: k is out of range, or labels are missing.
    """
    classes = logits.shape[-1]
    if not 1 <= k < classes:
        raise ValueError(f"k must lie between 1 and {classes - 1}, found {k}")
    p = at_least_float32(logits).softmax(-1)
    kept, ids = p.topk(k)
    lost = (1 - kept.sum(-1, keepdim=True)).clamp(min=0)
    if rest == "uniform":
        return (lost / (classes - k)).expand_as(p).scatter(-1, ids, kept)
    target = torch.zeros_like(p).scatter(-1, ids, kept)
    if rest == "renormalised":
        return target / target.sum(-1, keepdim=True)
    if labels is None:
        raise ValueError("the mass that is left over cannot go to labels: there are none")
    known = (labels != IGNORE)[..., None]
    given = target.scatter_add(-1, labels.clamp(min=0)[..., None], lost)
    return torch.where(known, given, target / target.sum(-1, keepdim=True))

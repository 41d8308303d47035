"""Merges of task vectors: what each model has learned since the common ancestor is thinned out, and put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from transfuse.core import rng
from transfuse.core.errors import InputError
from transfuse.weights.base import Merge, weights_of

PIECE = 2**17
"""Entries whose signs are compared at once, as many as stay in a processor's cache."""
LEAST = torch.finfo(torch.float32).tiny
"""What a sum of nothing, 0, is divided by."""


class TaskVectorMerge(Merge):
    """Base of merges that see models only through their task vectors, tau_i = theta_i - base.

    merged = base + combine(tau_1, ..., tau_n)
    """

    needs_base = True

    def combine(self, key: str, deltas: list[Tensor]) -> Tensor:
        """What is added to the base.

        Args:
            deltas: task vectors, float32, one per model; they may be overwritten.
        """
        raise NotImplementedError

    def merge(self, key: str, base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
        assert base is not None
        # A subtraction mixes types as it goes, so that tensors of half precision are never copied to full.
        return self.combine(key, [torch.sub(tensor, base) for tensor in tensors]).add_(base)


class Thinned(TaskVectorMerge):
    """Base of merges that thin task vectors out and sum them, or those entries whose sign is that of most.

        sum:        merged = base + scale * sum_i w_i thin(tau_i)             divided by sum_i w_i if normalised
        consensus:  merged = base + scale * sum_i m_i w_i thin(tau_i)         divided by sum_i m_i w_i if normalised

    where m_i is 1 at the entries of model i that have the sign of the weighted sum, and that are not 0.
    """

    weight: float | Sequence[float]
    scale: float
    normalize: bool
    consensus: ClassVar[bool | None] = None
    """Whether signs are elected; None: the method has an argument `consensus` that says so."""

    def thin(self, key: str, number: int, models: int, delta: Tensor) -> Tensor:
        """What survives of one model's task vector, which may be overwritten."""
        return delta

    def combine(self, key: str, deltas: list[Tensor]) -> Tensor:
        weights = weights_of(self.weight, len(deltas), type(self).__name__, normalize=False)
        thinned = [self.thin(key, i, len(deltas), delta) for i, delta in enumerate(deltas)]
        if self.consensus:
            return elected(thinned, weights, self.normalize).mul_(self.scale)
        total = thinned[0].mul_(weights[0])
        for weight, delta in zip(weights[1:], thinned[1:], strict=True):
            total.add_(delta, alpha=weight)
        if self.normalize and abs(sum(weights)) > 1e-8:
            total.div_(sum(weights))
        return total.mul_(self.scale)


def elected(
    deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool, least: Sequence[float] | None = None
) -> Tensor:
    """The weighted sum, or mean, of those entries that have the sign of the weighted sum of all; where it is 0, plus.

    The first tensor is overwritten, and returned.

    Args:
        least: of each tensor, the magnitude below which entries count as 0.
    """
    flats = [delta.view(-1) for delta in deltas]
    for start in range(0, len(flats[0]), PIECE):
        parts = [flat[start : start + PIECE] for flat in flats]
        if least is not None:  # what is at most this is zeroed, so it must be just below
            below = [float(np.nextafter(np.float32(value), np.float32(0))) for value in least]
            parts = [F.hardshrink(part, bound) for part, bound in zip(parts, below, strict=True)]
        weighted = [part if w == 1 else part * w for part, w in zip(parts, weights, strict=True)]
        sign = torch.copysign(parts[0].new_ones(()), _sum(weighted).add_(0.0))  # no zero is negative after that
        agreeing = [(part * sign).clamp_(min=0) for part in weighted]
        total = _sum(agreeing).mul_(sign)
        if normalize:
            share = _sum(
                [part.sign_().mul_(w) if w != 1 else part.sign_() for part, w in zip(agreeing, weights, strict=True)]
            )
            total.div_(share.clamp_(min=LEAST) if min(weights) > 0 else share.masked_fill_(share == 0, 1))
        flats[0][start : start + PIECE] = total
    return deltas[0]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0].clone()
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total.add_(part)
    return total


def of_model(value: float | Sequence[float], number: int, models: int, name: str) -> float:
    """One model's number, of one for all or a list.

    Raises:
        InputError: the list has another length.
    """
    if not isinstance(value, Sequence):
        return float(value)
    if len(value) != models:
        raise InputError(f"{name} has {len(value)} numbers, there are {models} models")
    return float(value[number])


def require_share(name: str, value: object, low: float = 0.0, high: float = 1.0) -> None:
    """Check a number, or each of a list; settings over depth and by name are checked once they are settled.

    Raises:
        InputError: one is out of its range.
    """
    for number in value if isinstance(value, list | tuple) else (value,):
        if isinstance(number, int | float) and not low <= number <= high:
            raise InputError(f"{name} is {number}, it must be between {low:g} and {high:g}")


def draws(seed: int, key: str, number: int) -> torch.Generator:
    """The random numbers of one tensor of one model, whatever else is merged, and in whichever order."""
    return torch.Generator().manual_seed(rng.derive(seed, key, number))

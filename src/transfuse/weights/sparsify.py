"""Which entries of a task vector survive. All functions change the tensor they are given, and return it."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL, SAMPLE = 2**16, 2**14
"""Entries that are selected from as they are, and entries that are looked at first where there are more."""


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Zero all but the largest magnitudes: `max(1, int(density * entries))` of them, of equal ones the first.

    Args:
        density: in [0, 1]; 0 keeps none.
    """
    return _keep(tensor, density, 0)


def keep_middle(tensor: Tensor, density: float, outliers: float) -> Tensor:
    """Zero the largest magnitudes and the smallest, so that `int(density * entries)` between them survive.

    Args:
        outliers: the share of the largest that are zeroed; less of it where too few entries would be left.
    """
    entries = tensor.numel()
    kept = int(density * entries)
    return _keep(tensor, density, min(int(outliers * entries), entries - kept))


def keep_random(tensor: Tensor, density: float, draw: torch.Generator) -> Tensor:
    """Zero each entry with the probability `1 - density`, and divide the others by `density`: unbiased."""
    if density >= 1:
        return tensor
    if density <= 0:
        return tensor.zero_()
    kept = torch.rand(tensor.shape, generator=draw) < density
    return tensor.mul_(kept).div_(density)


def keep_by_rank(tensor: Tensor, density: float, spread: float, draw: torch.Generator) -> Tensor:
    """Keep each entry with a probability that rises with its rank in its row, from `density - spread` to `+ spread`.

    What survives is divided by its probability, so the expectation is the tensor. A vector is one row.
    """
    rows = tensor.view(1, -1) if tensor.dim() < 2 else tensor.flatten(1)
    ranks = rows.abs().argsort(stable=True, dim=1).argsort(1).float()
    probabilities = density - spread + 2 * spread * ranks / max(1, rows.shape[1] - 1)
    kept = torch.rand(rows.shape, generator=draw) < probabilities
    rows.mul_(kept).div_(probabilities)
    return tensor


def kth_largest(magnitudes: Tensor, k: int) -> Tensor:
    """The k-th largest of `(entries,)`, exactly; 1 is the largest.

    Of many, a sample tells between which two numbers it must be, and only what lies between them is searched.
    """
    entries = magnitudes.numel()
    if entries > SMALL:
        sample = magnitudes[:: entries // SAMPLE].sort().values
        at, around = (1 - k / entries) * len(sample), 4 * len(sample) ** 0.5
        low = sample[max(0, int(at - around))] if at > around else magnitudes.new_zeros(())
        high = sample[int(at + around)] if at + around < len(sample) else magnitudes.new_full((), torch.inf)
        between = magnitudes[(magnitudes >= low) & (magnitudes <= high)]
        left = k - int((magnitudes > high).sum())
        if 0 < left <= len(between):
            return between.kthvalue(len(between) - left + 1).values
    return magnitudes.kthvalue(entries - k + 1).values


def _keep(tensor: Tensor, density: float, above: int) -> Tensor:
    """Keep the magnitudes whose ranks, from the largest on, are behind `above`."""
    entries = tensor.numel()
    if density >= 1 or not entries:
        return tensor
    count = max(1, int(density * entries)) if density > 0 else 0
    if not count:
        return tensor.zero_()
    flat = tensor.view(-1)
    magnitudes = flat.abs()
    _zero_beyond(flat, magnitudes, above + count)
    if above:
        _zero_largest(flat, magnitudes, above)
    return tensor


def _zero_beyond(flat: Tensor, magnitudes: Tensor, count: int) -> None:
    """Zero what is not among the `count` largest."""
    least = kth_largest(magnitudes, count)
    flat.masked_fill_(magnitudes < least, 0)
    equal = (magnitudes == least).nonzero()[:, 0]
    flat[equal[count - int((magnitudes > least).sum()) :]] = 0


def _zero_largest(flat: Tensor, magnitudes: Tensor, count: int) -> None:
    """Zero the `count` largest."""
    least = kth_largest(magnitudes, count)
    equal = (magnitudes == least).nonzero()[:, 0]
    flat[equal[: count - int((magnitudes > least).sum())]] = 0
    flat.masked_fill_(magnitudes > least, 0)

"""Which entries of a task vector survive. All functions change the tensor they are given, and return it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SMALL, SAMPLE, PIECE = 2**16, 2**14, 2**17
"""Entries that are searched as they are; entries that are looked at first where there are more; entries that are worked
on at once, as many as stay in a processor's cache."""


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Zero all but the largest magnitudes, :func:`kept` of them, of equal ones the first.

    Args:
        density: in [0, 1]; 0 keeps none.
    """
    return _keep(tensor, density, 0)


def kept(density: float, entries: int) -> int:
    """How many of so many entries survive: at least one, unless the density is 0."""
    return max(1, int(density * entries)) if density > 0 else 0


def keep_middle(tensor: Tensor, density: float, outliers: float) -> Tensor:
    """Zero the largest magnitudes and the smallest, so that :func:`kept` between them survive.

    Args:
        outliers: the share of the largest that are zeroed; less of it where too few entries would be left.
    """
    entries = tensor.numel()
    return _keep(tensor, density, min(int(outliers * entries), entries - kept(density, entries)))


def keep_random(tensor: Tensor, density: float, draw: torch.Generator) -> Tensor:
    """Zero each entry with the probability `1 - density`, and divide the others by `density`: unbiased."""
    if density >= 1:
        return tensor
    if density <= 0:
        return tensor.zero_()
    return tensor.mul_(torch.rand(tensor.shape, generator=draw) < density).div_(density)


def keep_by_rank(tensor: Tensor, density: float, spread: float, draw: torch.Generator) -> Tensor:
    """Keep each entry with a probability that rises with its rank in its row, from `density - spread` to `+ spread`.

    What survives is divided by its probability, so the expectation is the tensor. A vector is one row.
    """
    rows = tensor.view(1, -1) if tensor.dim() < 2 else tensor.flatten(1)
    ranks = rows.abs().argsort(stable=True, dim=1).argsort(1).float()
    probabilities = density - spread + 2 * spread * ranks / max(1, rows.shape[1] - 1)
    rows.mul_(torch.rand(rows.shape, generator=draw) < probabilities).div_(probabilities)
    return tensor


def least_kept(flat: Tensor, count: int) -> float:
    """The smallest of the `count` largest magnitudes of `(entries,)`; of equal ones, those too many are zeroed.

    Of many entries, a sample tells between which two numbers it must be, and only what lies between them is searched.
    """
    entries = len(flat)
    low, high = _bracket(flat, count) if entries > SMALL else (0.0, float("inf"))
    values = flat.numpy()  # whose comparisons and choices are several times as fast as torch's on one core
    while True:
        above, found = 0, []
        for start in range(0, entries, PIECE):
            magnitudes = np.abs(values[start : start + PIECE])
            beyond = magnitudes > high
            above += int(np.count_nonzero(beyond))
            found.append(magnitudes[(magnitudes >= low) ^ beyond])
        between, left = np.concatenate(found), count - above
        if 0 < left <= len(between):
            break
        low, high = 0.0, float("inf")  # the sample was not like the rest
    least = np.partition(between, len(between) - left)[len(between) - left]
    surplus = int(np.count_nonzero(between >= least)) - left if least > 0 else 0
    for start in reversed(range(0, entries, PIECE)):
        if not surplus:
            break
        part = values[start : start + PIECE]
        equal = np.flatnonzero(np.abs(part) == least)[-surplus:]
        part[equal] = 0
        surplus -= len(equal)
    return float(least)


def _bracket(flat: Tensor, count: int) -> tuple[float, float]:
    """Between which two magnitudes the `count`-th largest is, with a probability that leaves little to do again."""
    sample = np.abs(flat.numpy()[:: len(flat) // SAMPLE])
    at, around = (1 - count / len(flat)) * len(sample), 4 * len(sample) ** 0.5
    first, last = max(0, int(at - around)), min(len(sample) - 1, int(at + around))
    found = np.partition(sample, (first, last))
    return (float(found[first]) if first else 0.0), (float(found[last]) if last < len(sample) - 1 else float("inf"))


def _keep(tensor: Tensor, density: float, above: int) -> Tensor:
    """Keep the magnitudes whose ranks, from the largest on, are behind `above`."""
    entries = tensor.numel()
    if density >= 1 or not entries:
        return tensor
    count = kept(density, entries)
    if not count:
        return tensor.zero_()
    flat = tensor.view(-1)
    flat.masked_fill_(flat.abs() < least_kept(flat, above + count), 0)
    if above:
        outliers = flat.clone()
        least = least_kept(outliers, above)  # zeroes the surplus of equal ones, which are no outliers then
        flat.masked_fill_(outliers.abs() >= max(least, torch.finfo(flat.dtype).tiny), 0)
    return tensor

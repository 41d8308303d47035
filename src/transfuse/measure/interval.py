"""How sure a mean is: bootstrap intervals over test samples and over seeds.

Here are the interval itself, the bootstrap of one quantity and of a paired difference. What an interval
means for a transfer is said in :mod:`transfuse.measure.verdict`; the per-sample values that go in come
from :mod:`~transfuse.measure.classification` and :mod:`~transfuse.measure.fidelity`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from transfuse.core.errors import InputError, ShapeError

_BLOCK = 2**21
"""How many resampled indices are held at once (16 MiB), unless a single draw has more."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the interval in which it lies with the given confidence, in the unit of the values."""

    mean: float
    low: float
    high: float
    confidence: float = 0.95

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.mean:+z.3f} [{self.low:z.3f}, {self.high:z.3f}]"


def bootstrap(values: Tensor, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
    """Mean of per-sample values with its percentile bootstrap interval (Efron, 1979).

    Samples are drawn again with replacement and, where there are two seeds or more, so are the seeds: both
    axes at once, since every seed is tested on the same samples (the pigeonhole bootstrap of Owen, 2007).

    A few seeds understate how much seeds differ, and the plain bootstrap with three of them covers 72 % where
    it says 95 % (simulated, seeds differing far more than samples). So the spread of the seed means is first
    stretched by what Student's t adds to a normal interval, as is usual for means of a few runs. One seed says
    nothing about other seeds: its interval is about samples alone.

    Args:
        values: `(seeds, samples)`, for example correctness or loss; one seed is `(1, samples)`.
        confidence: share of the draws inside the interval, between 0 and 1.
        draws: how many times to resample.
        seed: of the resampling; torch's global generator is neither read nor moved.

    Raises:
        ShapeError: `values` does not have two dimensions.
        InputError: `values` is empty or not finite, or `confidence` or `draws` is out of range.
    """
    values = _checked(values)
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, found {confidence}: 95 % is 0.95")
    if draws < 1:
        raise InputError(f"bootstrap needs at least 1 draw, found {draws}")
    means = torch.cat(list(_resampled_means(_stretched(values, confidence), draws, seed)))
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return Interval(values.mean().item(), low, high, confidence)


def paired(values: Tensor, baseline: Tensor, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
    """Interval of `values - baseline`, sample paired with sample and seed with seed.

    Args:
        values: `(seeds, samples)` of the method.
        baseline: `(seeds, samples)` of what it is compared with: same samples and seeds, same order.
        confidence, draws, seed: as in :func:`bootstrap`.

    Raises:
        ShapeError: the two shapes differ, or do not have two dimensions.
        InputError: as in :func:`bootstrap`.
    """
    if values.shape != baseline.shape:
        raise ShapeError(
            f"a paired difference needs the same (seeds, samples) on both sides, found {tuple(values.shape)} "
            f"and {tuple(baseline.shape)}: evaluate both on the same samples, with the same seeds"
        )
    return bootstrap(_checked(values) - _checked(baseline), confidence=confidence, draws=draws, seed=seed)


def _checked(values: Tensor) -> Tensor:
    """The values in double precision on the CPU, where the draws are the same on every machine."""
    if values.dim() != 2:
        raise ShapeError(
            f"expected values of shape (seeds, samples), found {tuple(values.shape)}: "
            "stack the seeds, or use values[None] for a single one"
        )
    if values.numel() == 0:
        raise InputError(f"nothing to resample: the values have shape {tuple(values.shape)}")
    values = values.detach().to("cpu", torch.float64)
    if not values.isfinite().all():
        bad = int((~values.isfinite()).sum())
        raise InputError(f"{bad} of {values.numel()} values are not finite: find out why before comparing")
    return values


def _stretched(values: Tensor, confidence: float) -> Tensor:
    """Seed means moved apart, so that their resampled spread is that of a t interval instead of one too narrow."""
    seeds = len(values)
    if seeds < 2:
        return values
    quantile = 0.5 + confidence / 2
    factor = math.sqrt(seeds / (seeds - 1)) * _t_quantile(quantile, seeds - 1) / NormalDist().inv_cdf(quantile)
    return values + (factor - 1) * (values.mean(dim=1, keepdim=True) - values.mean())


def _t_quantile(quantile: float, freedom: int) -> float:
    """Quantile, above one half, of Student's t: with t = sqrt(freedom) tan(angle) its density is a power of cos."""
    angle = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)
    mass = angle.cos().pow(freedom - 1).cumsum(0)
    found = angle[torch.searchsorted(mass / mass[-1], 2 * quantile - 1)]
    return math.sqrt(freedom) * math.tan(found)


def _resampled_means(values: Tensor, draws: int, seed: int) -> Iterator[Tensor]:
    """The mean of every draw, `(chunk,)` at a time."""
    seeds, samples = values.shape
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, _BLOCK // samples)
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        per_seed = _counts(size, samples, generator) @ values.T / samples
        # A single seed is always drawn once: its counts are all ones.
        yield (per_seed * _counts(size, seeds, generator)).sum(dim=1) / seeds


def _counts(draws: int, size: int, generator: torch.Generator) -> Tensor:
    """How often each of `size` things is drawn when `size` are drawn with replacement: `(draws, size)`."""
    drawn = torch.randint(size, (draws, size), generator=generator)
    counts = torch.zeros(draws, size, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones(1, 1, dtype=torch.float64).expand(draws, size))

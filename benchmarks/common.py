"""What benchmarks share: measuring in pairs, the shape of a result, and its limits."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from transfuse.core.machine import machine, versions


@dataclass
class Result:
    """What a benchmark found. One label names a comparison in all of its mappings.

    Attributes:
        name: the benchmark.
        ratios: one ratio per pair of measurements; below 1, we are faster.
        limits: the largest median that is good enough.
        seconds: medians of what the ratios were made of, for reading.
    """

    name: str
    ratios: dict[str, list[float]] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, label: str, limit: float, pairs: Sequence[tuple[float, float]]) -> None:
        """Take one comparison: pairs of (our seconds, their seconds)."""
        ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        self.ratios[label] = [a / b for a, b in pairs]
        self.limits[label] = limit
        self.seconds[label] = {"ours": ours, "theirs": theirs}

    @property
    def over(self) -> list[str]:
        """The comparisons whose median is over its limit."""
        return [label for label, ratios in self.ratios.items() if statistics.median(ratios) > self.limits[label]]

    def as_json(self) -> dict[str, Any]:
        """What is written to a file."""
        spread = {
            label: {"median": statistics.median(r), "min": min(r), "max": max(r), "pairs": len(r)}
            for label, r in self.ratios.items()
        }
        return {**asdict(self), "ratios": spread, "machine": machine(), "versions": versions()}


def alternate(
    ours: Callable[[], float], theirs: Callable[[], float], repeats: int, warmup: int = 1
) -> list[tuple[float, float]]:
    """Pairs of seconds, measured in turns A B A B ..., so that a machine that slows down slows both.

    The first `warmup` pairs are left out.
    """
    return [(ours(), theirs()) for _ in range(warmup + repeats)][warmup:]


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect now and not again within the block, where it would hit one side of a pair or the other."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

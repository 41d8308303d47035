"""Where a run stands, and numbers that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from transfuse.core.method import Method


@dataclass
class Clock:
    """Position in the current stage. `step` counts updates, never micro-batches.

    Attributes:
        stage: number of the stage, from 0.
        step: updates done in this stage.
        steps: updates this stage will do.
        per_epoch: updates per epoch, or None for data without a length.
    """

    stage: int = 0
    step: int = 0
    steps: int = 1
    per_epoch: int | None = None

    @property
    def epoch(self) -> int:
        """Epochs completed in this stage; 0 throughout for data without a length."""
        return self.step // self.per_epoch if self.per_epoch else 0

    @property
    def epochs(self) -> int:
        """Epochs this stage will do, rounded up."""
        return math.ceil(self.steps / self.per_epoch) if self.per_epoch else 1

    @property
    def fraction(self) -> float:
        """Share of the stage that is done, in [0, 1]."""
        return min(self.step / self.steps, 1.0) if self.steps else 1.0


class Schedule:
    """A number that is a function of the clock: learning-rate factors, loss weights.

    A schedule times a method weighs the method: `Linear(0, 1) * RKD()`.
    """

    def __call__(self, clock: Clock) -> float:
        raise NotImplementedError

    @overload
    def __mul__(self, other: Method) -> Method: ...
    @overload
    def __mul__(self, other: Schedule | float) -> Schedule: ...
    def __mul__(self, other: Method | Schedule | float) -> Method | Schedule:
        return Product(self, other) if isinstance(other, Schedule | float | int) else other.weighted(self)

    def __rmul__(self, other: float) -> Schedule:
        return Product(other, self)


@dataclass(frozen=True)
class Constant(Schedule):
    """Always `value`."""

    value: float = 1.0

    def __call__(self, clock: Clock) -> float:
        return self.value


@dataclass(frozen=True)
class Linear(Schedule):
    """From `start` to `end` along the stage, straight."""

    start: float
    end: float

    def __call__(self, clock: Clock) -> float:
        return self.start + (self.end - self.start) * clock.fraction


@dataclass(frozen=True)
class Cosine(Schedule):
    """From `start` to `end` along half a cosine."""

    start: float = 1.0
    end: float = 0.0

    def __call__(self, clock: Clock) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * clock.fraction))


@dataclass(frozen=True)
class InverseDecay(Schedule):
    """From 1 down as (1 + gain * progress)**-power: the learning rate that domain adaptation is usual to train with."""

    gain: float = 10.0
    power: float = 0.75

    def __call__(self, clock: Clock) -> float:
        return (1 + self.gain * clock.fraction) ** -self.power


@dataclass(frozen=True)
class Warmup(Schedule):
    """Rise from 0 over the first `steps` updates, then follow another schedule."""

    steps: int
    then: Schedule = Constant()

    def __call__(self, clock: Clock) -> float:
        return min(1.0, (clock.step + 1) / self.steps) * self.then(clock) if self.steps else self.then(clock)


class Product(Schedule):
    """The product of schedules and numbers."""

    def __init__(self, *factors: Schedule | float):
        self.factors = factors

    def __call__(self, clock: Clock) -> float:
        return math.prod(f(clock) if isinstance(f, Schedule) else f for f in self.factors)

    def __repr__(self) -> str:
        return " * ".join(f"{f!r}" if isinstance(f, Schedule) else f"{f:g}" for f in self.factors)

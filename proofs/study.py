"""A proof whose claim is no trained target's score: a correlation, a rank, a measure, several numbers at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transfuse.core import catalogue
from transfuse.core.errors import InputError

Numbers = float | Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Study:
    """An experiment that is a function of a seed and gives one number, or several, for every arm.

    Attributes:
        name: of the file it is declared in, and of its result.
        proves: names in the catalogue that it is evidence for; the first gives family and sheet.
        data: in words.
        trial: `trial(seed, smoke)` returns `{arm: value}` or `{arm: {metric: value}}` with `metric` among them;
            with `smoke` a few seconds, to show that the machinery works.
        arms: their names, the judged one first.
        baseline: the arm over which the gain is taken.
        metric: what the values are.
        higher_is_better: which way the metric points.
        expected: what the paper leads one to expect, written before the result.
        seeds: of the trials; an interval is over seeds alone.
        notes: what to know about the result, and why it may differ from what was expected; written after it.

    Raises:
        InputError: the baseline is no other arm, or nothing is called what `proves` says.
    """

    name: str
    proves: tuple[str, ...]
    data: str
    trial: Callable[[int, bool], Mapping[str, Numbers]]
    arms: tuple[str, ...]
    baseline: str
    metric: str
    expected: str
    higher_is_better: bool = True
    seeds: tuple[int, ...] = (0, 1, 2)
    notes: str = ""

    def __post_init__(self) -> None:
        if self.baseline not in self.arms[1:]:
            raise InputError(f"the baseline of {self.name!r} is {self.baseline!r}, its other arms are {self.arms[1:]}")
        for proven in self.proves:
            catalogue.find(proven)

    @property
    def family(self) -> str:
        """The folder it belongs to."""
        return catalogue.find(self.proves[0]).family

    @property
    def sheet(self) -> int | None:
        """Number of the system's sheet."""
        return catalogue.find(self.proves[0]).card.sheet

    def values(self, seed: int, smoke: bool) -> dict[str, dict[str, float]]:
        """Every metric of every arm with one seed.

        Raises:
            InputError: the trial left out an arm, or brought one that was not declared.
        """
        found = self.trial(seed, smoke)
        if set(found) != set(self.arms):
            raise InputError(f"{self.name!r} declares the arms {self.arms}, its trial returned {tuple(found)}")
        return {
            arm: {k: float(v) for k, v in (value if isinstance(value, Mapping) else {self.metric: value}).items()}
            for arm, value in ((arm, found[arm]) for arm in self.arms)
        }

"""The shape of `proofs/results/<name>.json`: every seed of every arm, and what follows from them."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Self

import torch
from pydantic import Field, JsonValue, ValidationError, model_validator

from transfuse import measure
from transfuse.core.errors import InputError, StoreError
from transfuse.core.files import write_atomically
from transfuse.report.schema import Machine, Part, Source, Verdict


class Run(Part):
    """One arm with one seed; `value` is the metric on test data, `metrics` are others, `seconds` the training alone.

    The trials of a study have no time of their own for each arm: it is that of the whole trial.
    """

    seed: int
    arm: str
    value: float
    seconds: float
    metrics: dict[str, float] = Field(default_factory=dict)


class Gain(Part):
    """By how much the method is better than another arm, with its 95 % interval over samples and seeds."""

    mean: float
    low: float
    high: float


class ProofResult(Part):
    """What one proof found. `gain` is that over the baseline; `gains` are those over every other arm."""

    name: str
    sheet: int | None
    family: str
    proves: list[str] = Field(min_length=1)
    method: str
    data: str
    source: Source | None
    training: dict[str, JsonValue]
    metric: str
    higher_is_better: bool
    baseline: str
    runs: list[Run] = Field(min_length=1)
    gain: Gain
    gains: dict[str, Gain]
    verdict: Verdict
    expected: str
    notes: str = ""
    machine: Machine
    versions: dict[str, str]
    commit: str | None
    date: date

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        found = [(run.arm, run.seed) for run in self.runs]
        wanted = [(arm, seed) for arm in self.arms for seed in self.seeds]
        if sorted(found) != sorted(wanted):
            raise ValueError("every arm needs every seed exactly once")
        if self.arms[0] != self.method or list(self.gains) != self.arms[1:]:
            raise ValueError("the method's runs come first, and gains are over each other arm, in the order of runs")
        if self.gains.get(self.baseline) != self.gain:
            raise ValueError(f"gain must be the entry of gains for the baseline, {self.baseline!r}")
        return self

    @property
    def arms(self) -> list[str]:
        """Names of the arms, the method's first."""
        return list(dict.fromkeys(run.arm for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        """Seeds that any arm was trained with."""
        return list(dict.fromkeys(run.seed for run in self.runs))

    def values(self, arm: str) -> list[float]:
        """The metric of one arm, seed by seed."""
        return [run.value for run in self.runs if run.arm == arm]

    def average(self, arm: str) -> float:
        """The metric of one arm, the mean over seeds."""
        return fmean(self.values(arm))

    def about(self, name: str) -> tuple[Gain, Verdict] | None:
        """The gain over the baseline, and the verdict, of one of the methods that the proof is about.

        The first arm has been judged over samples and seeds; another one's interval is over seeds alone. None where
        the method has no arm of its own, or is the baseline.
        """
        own = next((arm for arm in self.arms if name in re.findall(r"\w+", arm)), self.method)
        if own == self.method:
            return self.gain, self.verdict
        if own == self.baseline:
            return None
        sign = 1 if self.higher_is_better else -1
        values, others = (sign * torch.tensor([self.values(arm)]).T for arm in (own, self.baseline))
        interval = measure.paired(values, others)
        verdict: Verdict = measure.verdict(interval)[0]  # type: ignore[assignment]
        return Gain(mean=interval.mean, low=interval.low, high=interval.high), verdict

    @classmethod
    def read(cls, path: Path) -> Self:
        """Load a result.

        Raises:
            StoreError: the file cannot be read.
            InputError: it is not a proof's result.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise StoreError(f"could not read the result {path}: {error.strerror}") from error
        except ValidationError as error:
            raise InputError(f"{path} is not the result of a proof: {error}") from error

    def write(self, path: Path) -> None:
        """Save atomically.

        Raises:
            StoreError: the file cannot be written.
        """
        write_atomically(path, self.model_dump_json(indent=2) + "\n")

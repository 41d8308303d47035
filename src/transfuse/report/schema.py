"""The shape of `report.json`, format 1.

Every number is finite: what could not be measured is null, or left out of a `metrics` mapping. Every gain
is an improvement: positive is better, whichever way the metric points. Fractions are in [0, 1].
Lives here: the models and reading and writing them. What is drawn from them: `html.py`, `terminal.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from transfuse.core.errors import InputError, StoreError
from transfuse.core.files import write_atomically
from transfuse.report.panels import Panel

Verdict = Literal["arrived", "no effect", "negative transfer", "not compared"]
Role = Literal["method", "baseline", "control", "method (compared)"]


class Part(BaseModel):
    """What all parts of a report share: unknown keys, NaN and infinity are refused, fields stay as set."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, populate_by_name=True)


class Interval(Part):
    """A mean with the interval that holds it at `confidence` (0.95 is 95 %)."""

    mean: float
    low: float
    high: float
    confidence: float


class Gain(Interval):
    """By how much an arm is better than the arm `against`, in units of the metric."""

    against: str


class LossTerm(Part):
    """One term of the loss at one step: as computed, times its weight, and the norm of its gradient."""

    raw: float
    weighted: float
    gradient_norm: float | None = None


class CurvePoint(Part):
    """Logged at one update. `validate`, the metric on validation data, is null between validations."""

    step: int
    epoch: float
    loss: float
    terms: dict[str, LossTerm] = {}
    # BaseModel has a method called validate, so the attribute needs another name than the key.
    validation: float | None = Field(default=None, alias="validate")


class Run(Part):
    """One training of one arm with one seed. `metrics` may hold accuracy, agreement, kl, ece, nll, ...

    `value` is null where there was no held-out data to measure on. `sets` is the metric on each of several held-out
    sets (tasks, clients, pools); `stages` the same after each stage of the training.
    """

    seed: int
    value: float | None = None
    seconds: float
    steps: int
    metrics: dict[str, float] = {}
    sets: dict[str, float] = {}
    stages: list[dict[str, float]] = []
    curve: list[CurvePoint] = []
    warnings: list[str] = []


class Calibration(Part):
    """A reliability curve: per bin the mean confidence and accuracy (null when empty) and sample count."""

    confidence: list[float | None]
    accuracy: list[float | None]
    count: list[int] = Field(min_length=1)

    @model_validator(mode="after")
    def _bins_match(self) -> Self:
        if not len(self.confidence) == len(self.accuracy) == len(self.count):
            raise ValueError("confidence, accuracy and count must have one entry per bin each")
        return self


class Arm(Part):
    """One way to train the target, run once per seed. `per_class` is the metric for each class."""

    name: str
    role: Role
    verdict: str | None = None
    gain: Gain | None = None
    value: Interval | None = None
    runs: list[Run] = Field(min_length=1)
    per_class: list[float | None] | None = None
    calibration: Calibration | None = None

    @property
    def seconds(self) -> float:
        """Training time of one run, the mean over seeds."""
        return fmean(run.seconds for run in self.runs)

    def average(self, metric: str) -> float | None:
        """Mean of a metric over the seeds that have it; None when none has."""
        values = [run.metrics[metric] for run in self.runs if metric in run.metrics]
        return fmean(values) if values else None


class Source(Part):
    """What the knowledge came from, measured on the same data as the arms."""

    name: str
    value: float | None = None
    metrics: dict[str, float] = {}


class ClassGain(Part):
    """The method's gain on the `count` samples of one class. The key of the name is "class"."""

    name: str = Field(alias="class")
    gain: float
    low: float
    high: float
    count: int


class Disagreement(Part):
    """How often the source says the row's class and the target the column's, `(classes, classes)`."""

    matrix: list[list[int]]

    @model_validator(mode="after")
    def _is_square(self) -> Self:
        if any(len(row) != len(self.matrix) for row in self.matrix):
            raise ValueError(f"the matrix must be square: {len(self.matrix)} rows need as many columns")
        return self


class Footprint(Part):
    """What a model costs to keep and to run. `flops` and `latency_ms` are per sample."""

    parameters: int
    bytes: int
    flops: float | None = None
    latency_ms: float


class Cost(Part):
    """Footprints of both ends. Without a source that is a model, `source` is null."""

    source: Footprint | None = None
    target: Footprint


class Machine(Part):
    """Where the runs were made. Further keys are allowed."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)

    cpu: str
    cores: int
    memory_gb: float
    accelerator: str | None = None


class Report(Part):
    """Whether the knowledge arrived, and everything needed to check that.

    `gain` is the gain of the arm whose role is "method", repeated for readers that want one number.
    """

    format: Literal[1] = 1
    name: str
    created: datetime
    task: str
    metric: str
    higher_is_better: bool
    verdict: Verdict
    why: str
    gain: Gain | None = None
    method: str
    arms: list[Arm]
    source: Source | None = None
    classes: list[str] | None = None
    per_class_gain: list[ClassGain] | None = None
    disagreement: Disagreement | None = None
    panels: list[Panel] = []
    cost: Cost | None = None
    recipe: dict[str, JsonValue]
    versions: dict[str, str]
    machine: Machine
    commit: str | None = None
    warnings: list[str] = []

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        names = Counter(arm.name for arm in self.arms)
        if repeated := [name for name, times in names.items() if times > 1]:
            raise ValueError(f"arms need different names, found {', '.join(map(repr, repeated))} repeatedly")
        methods = [arm.name for arm in self.arms if arm.role == "method"]
        if len(methods) != 1:
            raise ValueError(f'exactly one arm must have the role "method", found {methods}')
        if self.classes and self.disagreement and len(self.classes) != len(self.disagreement.matrix):
            rows = len(self.disagreement.matrix)
            raise ValueError(f"the disagreement matrix has {rows} rows for {len(self.classes)} classes")
        return self

    @property
    def method_arm(self) -> Arm:
        """The arm that this report is about."""
        return next(arm for arm in self.arms if arm.role == "method")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Load `report.json`.

        Raises:
            StoreError: the file cannot be read, or is not JSON.
            InputError: it is JSON of another shape; the message lists what and where.
        """
        try:
            content = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise StoreError(f"could not read the report {path}: {error.strerror}") from error
        except ValueError as error:
            raise StoreError(f"{path} is not JSON ({error}): it may be cut off or altered") from error
        return cls._checked(content, str(path))

    def write(self, path: str | Path) -> None:
        """Save as `report.json`, atomically.

        Raises:
            InputError: lists or mappings were changed since construction, so that the report no longer fits.
            StoreError: the file cannot be written.
        """
        checked = self._checked(self.model_dump(), "the report")
        write_atomically(path, checked.model_dump_json(indent=2, by_alias=True) + "\n")

    @classmethod
    def _checked(cls, content: object, what: str) -> Self:
        # Never model_validate_json: it lets NaN pass in free-form values (`recipe`, `machine`).
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            problems = [f"\n  {'.'.join(map(str, e['loc'])) or 'top level'}: {e['msg']}" for e in error.errors()]
            raise InputError(
                f"{what} is not a report of format 1, {len(problems)} problems:{''.join(problems[:10])}"
            ) from error

"""What a proof declares, and finding the proofs. Running one: `runner.py`; its result: `result.py`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from proofs.study import Study
from transfuse.core import catalogue
from transfuse.core.errors import InputError, nearest
from transfuse.core.method import Method
from transfuse.datasets import Splits
from transfuse.evaluation import HIGHER_IS_BETTER

HERE = Path(__file__).parent
SHUFFLED = "shuffled teacher"


@dataclass(frozen=True, eq=False)
class Trained:
    """A source that is trained on labels before the proof begins, once for all proofs that share the object.

    Attributes:
        build: makes the untrained model.
        splits: only their train part is used.
        training: what :class:`~transfuse.core.training.Training` takes.
    """

    build: Callable[[], nn.Module]
    splits: Callable[[], Splits]
    training: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Proof:
    """An experiment that could show that a method does not do what its paper says.

    Every arm has the same budget and seeds. The last weights of a training are tested, so nothing is chosen by
    test data; settings were chosen on validation data, with other seeds.

    Attributes:
        name: of the file it is declared in, and of its result.
        proves: names in the catalogue of the methods it is evidence for; the first gives family and sheet.
        data: in words, with the number of samples and labels.
        splits: loads the data: `train`, and `test` for the result. Either may be several sets, as a dict or a list.
        source: the teacher; a list of teachers; a function that returns what :func:`transfuse.transfer` takes as
            source (a data set, models); or None.
        target: builds the student, and every seed has its own initial weights; or a trained model to start from.
        method: the arm that is judged.
        compare: the other arms, as :class:`transfuse.Transfer` takes them.
        baseline: name of the arm over which the gain is taken: what the method promises to improve on.
        training: what :class:`~transfuse.core.training.Training` takes, the same for all arms.
        expected: the ordering that the paper leads one to expect, written before the result.
        seeds: of the arms.
        metric: one of :data:`transfuse.evaluation.HIGHER_IS_BETTER`.
        notes: what to know about the result, and why it may differ from what was expected; written after it.

    Raises:
        InputError: the baseline is no arm, the metric is unknown, or no method is called what `proves` says.
    """

    name: str
    proves: tuple[str, ...]
    data: str
    splits: Callable[[], Splits]
    source: Trained | Sequence[Trained | Callable[[], Any]] | Callable[[], Any] | None
    target: Callable[[], nn.Module] | Trained
    method: Method
    compare: tuple[str | Method, ...]
    baseline: str
    training: Mapping[str, Any]
    expected: str
    seeds: tuple[int, ...] = (0, 1, 2)
    metric: str = "accuracy"
    notes: str = ""

    def __post_init__(self) -> None:
        if self.baseline not in self.arms[1:]:
            raise InputError(f"the baseline of {self.name!r} is {self.baseline!r}, its other arms are {self.arms[1:]}")
        if self.metric not in HIGHER_IS_BETTER:
            raise InputError(f"the metric of {self.name!r} is unknown: {nearest(self.metric, HIGHER_IS_BETTER)}")
        for method in self.proves:
            catalogue.find(method)

    @property
    def family(self) -> str:
        """The folder it belongs to."""
        return catalogue.find(self.proves[0]).family

    @property
    def sheet(self) -> int | None:
        """Number of the system's sheet."""
        return catalogue.find(self.proves[0]).card.sheet

    @property
    def arms(self) -> list[str]:
        """Names of all arms, the method's first."""
        return [entry if isinstance(entry, str) else repr(entry) for entry in (self.method, *self.compare)]


def names() -> list[str]:
    """All proofs, by family and name, without importing them."""
    return [path.stem for path in _files()]


def find(name: str) -> Proof | Study:
    """The proof of this name.

    Raises:
        InputError: there is none; the nearest names are given.
    """
    for path in _files():
        if path.stem == name:
            proof: Proof | Study = importlib.import_module(f"proofs.{path.parent.name}.{path.stem}").PROOF
            return proof
    raise InputError(f"no proof is called {name!r}: {nearest(name, names())}")


def _files() -> list[Path]:
    return [
        path
        for family in catalogue.FAMILIES
        for path in sorted((HERE / family).glob("*.py"))
        if not path.stem.startswith("_")
    ]

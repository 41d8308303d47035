"""What every loader returns, how a data set is split, and how labels are hidden.

Loaders of particular data live in the other files of this folder; batching and order are the trainer's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from transfuse.core.errors import InputError
from transfuse.losses.reduction import IGNORE


@dataclass(frozen=True)
class Splits:
    """A data set cut into the part to learn from, the part to choose by and the part to report on.

    Args:
        train, validate, test: map-style data sets; the last two may be None. Each may also be a list of data sets
            (tasks, clients) or a dict of them by name (pools, domains), as :func:`transfuse.transfer` takes them.
        classes: the names of the classes 0, 1, ...; None where there are no classes or no names.
        name: of the data set, for reports.
        task: what is learnt: `"classification"`, `"language-model"`, ...
        source: labelled data of another domain, where there is one: what an adaptation takes as `source=`.

    Raises:
        InputError: a `TensorDataset(inputs, labels)` has labels that are not 0 .. `len(classes) - 1` or
            :data:`~transfuse.losses.reduction.IGNORE`.
    """

    train: Any
    validate: Any = None
    test: Any = None
    classes: tuple[str, ...] | None = None
    name: str = "data"
    task: str = "classification"
    source: Dataset[Any] | None = None

    def __post_init__(self) -> None:
        for part in (self.train, self.validate, self.test, self.source):
            for data in _single(part):
                if self.classes is not None and isinstance(data, TensorDataset) and len(data.tensors) == 2:
                    check_labels(data.tensors[1], len(self.classes), self.name)

    def few_labels(self, count: int, seed: int = 0) -> Splits:
        """The same data with only `count` labels in train; the others become IGNORE.

        The labels are dealt out to the classes in turn, so the classes get equally many as far as they have
        them. One seed gives nested choices: 20 labels are among the 50 of the same seed.

        Raises:
            InputError: train is not a `TensorDataset(inputs, labels)`, or `count` is larger than the number
                of labels or smaller than the number of classes in it.
        """
        if not isinstance(self.train, TensorDataset) or len(self.train.tensors) != 2:
            raise InputError(
                f"labels can be hidden in a TensorDataset(inputs, labels), found {type(self.train).__name__}"
                f" as the train part of {self.name}: wrap its tensors in one"
            )
        inputs, labels = self.train.tensors
        labelled = torch.nonzero(labels != IGNORE)[:, 0]
        present = labels[labelled].unique()
        if not len(present) <= count <= len(labelled):
            raise InputError(
                f"{self.name} has {len(labelled)} labels of {len(present)} classes to train on: "
                f"keep between {len(present)} and {len(labelled)} of them, found {count}"
            )
        order = labelled[torch.randperm(len(labelled), generator=torch.Generator().manual_seed(seed))]
        turn = torch.empty_like(order)
        for label in present:
            of_class = labels[order] == label
            turn[of_class] = torch.arange(int(of_class.sum()))
        kept = order[turn.argsort(stable=True)[:count]]
        few = torch.full_like(labels, IGNORE)
        few[kept] = labels[kept]
        return replace(self, train=TensorDataset(inputs, few))

    def only(self, classes: Sequence[int], renumber: bool = True) -> Splits:
        """The samples of some classes, in every part.

        Args:
            classes: which, in the order of their new labels.
            renumber: labels count from 0, and :attr:`classes` has the names of these only; False keeps both.

        Raises:
            InputError: a part is not a `TensorDataset(inputs, labels)`, a class is given twice, or train lacks it.
        """
        if len(set(classes)) < len(classes) or not classes:
            raise InputError(f"classes must be given, each once, found {list(classes)}")
        new: dict[str, Any] = {
            name: self._only(name, classes, renumber) for name in ("train", "validate", "test", "source")
        }
        names = tuple(self.classes[c] for c in classes) if self.classes and renumber else self.classes
        return replace(self, classes=names, name=f"{self.name}, classes {', '.join(map(str, classes))}", **new)

    def _only(self, name: str, classes: Sequence[int], renumber: bool) -> TensorDataset | None:
        part = getattr(self, name)
        if part is None:
            return None
        if not isinstance(part, TensorDataset) or len(part.tensors) != 2:
            raise InputError(
                f"classes can be chosen from a TensorDataset(inputs, labels), found {type(part).__name__} as the "
                f"{name} part of {self.name}"
            )
        inputs, labels = part.tensors
        if name == "train" and (absent := set(classes) - set(labels.unique().tolist())):
            raise InputError(f"{self.name} has no training samples of the classes {sorted(absent)}")
        kept = torch.isin(labels, torch.tensor(list(classes)))
        labels = labels[kept]
        if renumber:
            new = torch.zeros(int(max(classes)) + 1, dtype=torch.long)
            new[list(classes)] = torch.arange(len(classes))
            labels = new[labels]
        return TensorDataset(inputs[kept], labels)


def _single(part: Any) -> Iterator[Any]:
    """The single data sets in a part."""
    if isinstance(part, Mapping):
        yield from part.values()
    elif isinstance(part, list | tuple):
        yield from part
    elif part is not None:
        yield part


def check_labels(labels: Tensor, classes: int, name: str) -> None:
    """Refuse labels that are not integers 0 .. classes - 1 or IGNORE."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"the labels of {name} must be integers, found {labels.dtype}: use labels.long()")
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORE)]
    if wrong.numel():
        raise InputError(
            f"the labels of {name} must be 0 to {classes - 1} ({classes} classes) or {IGNORE} (no label), "
            f"found {wrong[0].item()}"
        )


def cuts(size: int, fractions: Sequence[float]) -> list[int]:
    """Where the train, validate and test parts of `size` things in a row begin, and where the last ends.

    Raises:
        InputError: `fractions` are not three numbers from 0 to 1 that add to 1, the first above 0.
    """
    if (
        len(fractions) != 3
        or not all(0 <= f <= 1 for f in fractions)
        or fractions[0] == 0
        or not math.isclose(sum(fractions), 1)
    ):
        raise InputError(
            "fractions are three numbers for train, validate and test that add to 1, the first above 0, "
            f"found {tuple(fractions)}"
        )
    return [0, *(round(size * f) for f in accumulate(fractions))]


def stratified(labels: Tensor, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Indices of the train, validate and test samples, each part with the same shares of the classes.

    Args:
        labels: `(samples,)` integers.
        fractions: of train, validate and test.
        seed: of the draw; within a part the order is random, too.

    Raises:
        InputError: `fractions` are wrong (see :func:`cuts`), or a part that should have samples gets none.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    part = torch.empty_like(order)
    for label in labels.unique():
        members = torch.nonzero(labels[order] == label)[:, 0]
        begins = cuts(len(members), fractions)
        for i in range(3):
            part[members[begins[i] : begins[i + 1]]] = i
    parts = [order[part == i] for i in range(3)]
    for found, fraction in zip(parts, fractions, strict=True):
        if fraction > 0 and len(found) == 0:
            raise InputError(
                f"{len(labels)} samples are too few to split by {tuple(fractions)} within every class: "
                "one part stays empty; set its fraction to 0 or bring more data"
            )
    return parts

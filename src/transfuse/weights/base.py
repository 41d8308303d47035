"""The family of weights: knowledge moves as parameters, from checkpoints into a checkpoint.

Two kinds of method live here. A :class:`Merge` is arithmetic: one function from the tensors of a name to a tensor, and
nothing is trained; it serves `transfer` (models in memory) and `merge` (checkpoints on disk, streamed) alike. A
:class:`~transfuse.weights.composed.Composed` learns a few numbers from which parameters are computed.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn

from transfuse.core.errors import InputError
from transfuse.core.method import Method
from transfuse.weights.checkpoint import Checkpoint, InMemory
from transfuse.weights.ledger import RELATED, survival

if TYPE_CHECKING:
    from transfuse.core.batch import Batch
    from transfuse.core.run import Run

Setting = Any
"""A number; a list with one for each model; `{"depth": [a, b, ...]}`, interpolated from the first layer to the last; or
a mapping from name patterns to any of these, of which the first that matches counts: `{"*.mlp.*": 0.3, "*": 0.5}`."""


class Merge(Method):
    """Base of merges. `"target"` is the common ancestor (or only the architecture), the sources are what is merged.

    Every argument of a merge may be a :data:`Setting`. `merge` never sees that: :meth:`at` makes the method that holds
    for one tensor, whose arguments are numbers and lists of numbers, and checks them by its `__init__`.
    """

    family = "weights"
    needs_data = False
    trains = False
    needs_base: ClassVar[bool] = False
    """Whether it reads the common ancestor; if not, `merge` may be given None."""
    elementwise: ClassVar[bool] = False
    """Whether each entry of a merged tensor follows from the same entries of the others, so that it can be computed in
    pieces that stay in a processor's cache."""
    exactly: ClassVar[int | None] = None
    """How many models it merges, where that is fixed."""

    def merge(self, key: str, base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
        """The merged tensor of one name.

        Args:
            key: the tensor's name, from which anything random must be drawn.
            base: the ancestor's tensor, float32, or None. tensors: one per model, float32. All of one shape; none may
                be written to.
        """
        raise NotImplementedError

    def at(self, key: str, depth: float) -> Self:
        """The method for one tensor.

        Args:
            depth: where in the network it is, from 0 (the first layer, and what is in none) to 1 (the last).
        """
        given = self._given()
        if not any(isinstance(part, Mapping) for value in given.values() for part in _parts(value)):
            return self
        return type(self)(**{name: settled(value, key, depth, name) for name, value in given.items()})

    def unknown_patterns(self, names: Collection[str]) -> list[str]:
        """The patterns in its arguments that fit none of these names; `"*"` is the rest, which may be nothing."""
        patterns = {p for value in self._given().values() for p in _patterns(value)}
        return sorted(p for p in patterns if p != "*" and not any(fnmatchcase(name, p) for name in names))

    def without(self, patterns: Collection[str]) -> Self:
        """The same without some patterns."""
        return type(self)(**{name: _without(value, patterns) for name, value in self._given().items()})

    def _given(self) -> dict[str, Any]:
        """Its arguments by name."""
        kind: Any = type(self)
        return {name: getattr(self, name) for name in _arguments(kind) if hasattr(self, name)}  # some have none

    def setup(self, run: Run, sample: Batch | None) -> None:
        from transfuse.weights.engine import Plan  # it stands on this module

        name = type(self).__name__
        if run.shuffled:
            raise InputError(f"{name} reads weights, not outputs, so there is no shuffled arm")
        if not run.sources:
            raise InputError(f"{name} merges the sources into the target: pass source=[model, ...]")
        # In a tuple, for they are no part of the method: nobody shall train or save them with it.
        self._parents = tuple((role, run[role]) for role in run.sources)
        plan = Plan.of(self, *self._opened(run["target"]), force=True)
        who, cosine = min(plan.ledger.cosines.items(), key=lambda item: item[1], default=("", 1.0))
        if cosine < RELATED:
            run.watch.say(
                "no common ancestor",
                f"{who} share no ancestor (cosine of their weights {cosine:.3f}): what a merge of them says is babble",
            )
        self._ledger = (plan.ledger,)

    def begin_stage(self, i: int, run: Run) -> bool:
        return False  # there is nothing to train

    def deploy(self, target: nn.Module) -> nn.Module:
        from transfuse.weights.engine import merge  # it stands on this module

        merged = copy.deepcopy(target)
        models, base = self._opened(target)
        merged.load_state_dict(merge(self, models, base, force=True).state or {})
        self._survival = survival(base, models, InMemory(merged, "merge"))
        return merged

    def panels(self) -> list[dict[str, Any]]:
        """Of a merge that was deployed."""
        (ledger,) = self._ledger
        models = list(ledger.distances)
        if not models:
            return []
        overlaps = [
            [ledger.overlaps.get(f"{a} and {b}", ledger.overlaps.get(f"{b} and {a}", 1.0)) for b in models]
            for a in models
        ]
        return [
            {
                "kind": "bars",
                "title": "How far each model is from the common start",
                "note": "The norm of what it has learned over that of the start, on some of the weights.",
                "rows": ["change"],
                "groups": models,
                "values": [list(ledger.distances.values())],
            },
            {
                "kind": "matrix",
                "title": "Whether models have learned in the same direction",
                "note": "Cosines of task vectors: near 0 they do not disturb each other, below 0 they do.",
                "rows": models,
                "columns": models,
                "values": overlaps,
            },
            {
                "kind": "bars",
                "title": "What of each model is in the merge",
                "note": "The merge's change along each model's own, as a share of it: 1 is all of it, 0 nothing, below "
                "0 the opposite.",
                "rows": ["after merging"],
                "groups": models,
                "values": [list(self._survival.values())],
            },
        ]

    def _opened(self, target: nn.Module) -> tuple[list[Checkpoint], Checkpoint]:
        return [InMemory(model, role) for role, model in self._parents], InMemory(target, "target")


@cache
def _arguments(kind: type[Merge]) -> tuple[str, ...]:
    """The names of a method's arguments; every tensor asks for them."""
    return tuple(inspect.signature(kind).parameters)


def settled(value: Setting, key: str, depth: float, name: str = "a setting") -> Any:
    """What a setting is for one tensor.

    Raises:
        InputError: no pattern matches the tensor's name, or a list over depth has fewer than two numbers.
    """
    if isinstance(value, Mapping):
        if value.keys() == {"depth"}:
            return _interpolated(value["depth"], depth, name)
        for pattern, inner in value.items():
            if fnmatchcase(key, pattern):
                return settled(inner, key, depth, name)
        raise InputError(
            f"{name} has no value for {key!r}: its patterns are {', '.join(map(repr, value))}; '*' matches the rest"
        )
    if isinstance(value, list | tuple):
        return [settled(part, key, depth, name) for part in value]
    return value


def _interpolated(values: Sequence[float], depth: float, name: str) -> float:
    if not isinstance(values, list | tuple) or len(values) < 2:
        raise InputError(f"{name} over depth is {values!r}: expected a list of at least two numbers")
    place = min(max(depth, 0.0), 1.0) * (len(values) - 1)
    low = min(int(place), len(values) - 2)
    (a, b), share = list(pairwise(values))[low], place - low
    return float(a + (b - a) * share)


def _patterns(value: Setting) -> Iterator[str]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _patterns(part)
    elif isinstance(value, Mapping) and value.keys() != {"depth"}:
        for pattern, inner in value.items():
            yield pattern
            yield from _patterns(inner)


def _without(value: Setting, patterns: Collection[str]) -> Setting:
    if isinstance(value, list | tuple):
        return [_without(part, patterns) for part in value]
    if isinstance(value, Mapping) and value.keys() != {"depth"}:
        return {pattern: _without(inner, patterns) for pattern, inner in value.items() if pattern not in patterns}
    return value


def _parts(value: Setting) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def weights_of(weight: float | Sequence[float], models: int, name: str, normalize: bool) -> list[float]:
    """One weight per model, from one number for all or a list.

    Raises:
        InputError: their number is another, or they cannot be made to sum to one.
    """
    found = [float(w) for w in weight] if isinstance(weight, Sequence) else [float(weight)] * models
    if len(found) != models:
        raise InputError(f"{name}: weight has {len(found)} numbers, there are {models} models")
    if not all(map(math.isfinite, found)):
        raise InputError(f"{name}: weights are {found}, expected finite numbers")
    if not normalize:
        return found
    if abs(sum(found)) < 1e-8:
        raise InputError(f"{name}: weights {found} sum to 0 and cannot be made to sum to one: pass normalize=False")
    return [w / sum(found) for w in found]

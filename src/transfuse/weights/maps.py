"""Parameters as linear functions of another model's: a map along each axis of a tensor, learned or fixed.

A map along an axis is a matrix `(new, old)`, or :class:`Copies` where every new entry is a multiple of one old entry.
`W' = L W R` is the map L along axis 0 and R^T along axis 1, whichever way a layer stores its weight. Maps that shrink
are learned (:class:`Mapped`); growth has fixed ones that enlarge.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError, ShapeError
from transfuse.core.run import Run
from transfuse.weights.composed import Composed

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Copies:
    """A map along an axis that copies.

    Attributes:
        index: `(new,)`, which old entry each new one copies.
        scale: `(new,)`, what it is multiplied by; None for 1.
        averaged: so many further entries follow that are the mean over the axis.
    """

    index: Tensor
    scale: Tensor | None = None
    averaged: int = 0


AxisMap = Tensor | Copies | None


def along(weight: Tensor, maps: Sequence[AxisMap]) -> Tensor:
    """The tensor with a map applied along each axis; None leaves an axis as it is. Gradients flow to all.

    >>> along(torch.tensor([[1.0, 2.0]]), [None, Copies(torch.tensor([0, 1, 1]), torch.tensor([1.0, 0.5, 0.5]))])
    tensor([[1., 1., 1.]])
    """
    for axis, change in enumerate(maps):
        if isinstance(change, Copies):
            weight = _copied(weight, axis, change)
        elif change is not None:
            weight = (weight.movedim(axis, -1) @ change.to(weight.dtype).T).movedim(-1, axis)
    return weight


def _copied(weight: Tensor, axis: int, copies: Copies) -> Tensor:
    found = weight.index_select(axis, copies.index)
    if copies.scale is not None:
        found = found * copies.scale.to(weight.dtype).view(-1, *[1] * (weight.dim() - axis - 1))
    if copies.averaged:
        mean = weight.mean(axis, keepdim=True)
        found = torch.cat([found, *[mean] * copies.averaged], axis)
    return found


def gaussian(new: int, old: int) -> Tensor:
    """A random map `(new, old)` that keeps the variance of what it is applied to."""
    return torch.randn(new, old) / old**0.5


def crop(new: int, old: int) -> Tensor:
    """The map `(new, old)` that keeps the first entries: rows of the identity, and zeros where it grows."""
    return torch.eye(new, old)


# Names and layers


def interpolated(layers: int, new: int) -> list[int]:
    """Which of the layers each new one takes, evenly spaced: `floor(j * layers / new)`.

    >>> interpolated(4, 6)
    [0, 0, 1, 2, 2, 3]
    """
    return [j * layers // new for j in range(new)]


def stacked(layers: int, new: int) -> list[int]:
    """The same by repeating all of them in order.

    >>> stacked(3, 6)
    [0, 1, 2, 0, 1, 2]
    """
    return [j % layers for j in range(new)]


def counterparts(target: Iterable[str], source: Iterable[str], layers: Sequence[int] | None = None) -> dict[str, str]:
    """The source's name of every parameter of the target: the same but for the number of its block.

    Args:
        layers: the source's block for every block of the target; evenly spaced by default.

    Raises:
        InputError: `layers` names blocks that are not there, or not one for each block.
    """
    wanted, known = _depths(target := list(target)), _depths(source)
    if layers is not None:
        fits = [prefix for prefix, depth in wanted.items() if depth == len(layers) and prefix in known]
        if not fits:
            raise InputError(
                f"layers has {len(layers)} numbers, the target has blocks {dict(wanted)}: give one for each"
            )
        highest = min(known[prefix] for prefix in fits)
        if not all(0 <= j < highest for j in layers):
            raise InputError(f"layers is {list(layers)}, the source's blocks are numbered 0 to {highest - 1}")
    found = {}
    for name in target:
        prefix, number, rest = _numbered(name)
        if number is not None and prefix in known:
            given = layers if layers is not None and len(layers) == wanted[prefix] else None
            number = (given or interpolated(known[prefix], wanted[prefix]))[number]
        found[name] = name if number is None else f"{prefix}{number}{rest}"
    return found


def _numbered(name: str) -> tuple[str, int | None, str]:
    match = re.match(r"((?:.*?\.)??)(\d+)(\..*)", name)
    return (match[1], int(match[2]), match[3]) if match else (name, None, "")


def _depths(names: Iterable[str]) -> dict[str, int]:
    """How many numbered blocks there are, by what stands before the number."""
    found: dict[str, int] = {}
    for name in names:
        prefix, number, _ = _numbered(name)
        if number is not None:
            found[prefix] = max(found.get(prefix, 0), number + 1)
    return found


# Learned maps


@dataclass(frozen=True)
class Rule:
    """How a parameter comes from one of the source: its name there, and the name of the map along each axis."""

    source: str
    maps: tuple[str | None, ...]


class Mapped(Composed):
    """Base of methods whose target has parameters that are learned maps of the source's.

    A subclass fills `maps` and `_rules` (by the name of the target's parameter) in `setup`, by :meth:`put`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ParameterDict()
        self._rules: dict[str, Rule] = {}
        self._theirs: Mapping[str, Tensor] = {}  # the source's, by name; they are no part of the method

    def begin(self, run: Run) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """The parameters of target and source by name, checked; the source's under all names that it has for one.

        Raises:
            InputError: a shuffled arm, no source or several, or one in half precision; the target ties weights that
                are two in the source.
        """
        name = type(self).__name__
        if run.shuffled:
            raise InputError(f"{name} reads weights, so there is no shuffled arm")
        if "source" not in run:
            raise InputError(f"{name} needs one source model, found {len(run.sources)}: pass source=teacher")
        self.maps, self._rules = nn.ParameterDict(), {}
        source: Mapping[str, Tensor] = dict(run["source"].named_parameters(remove_duplicate=False))
        self._theirs = source
        half = next((key for key, p in source.items() if p.dtype in HALF), None)
        if half is not None:
            raise InputError(
                f"{name}: the source's {half} is {source[half].dtype}, the learned maps are float32: use source.float()"
            )
        own = dict(run["target"].named_parameters())
        owners = {id(p): key for key, p in own.items()}
        for key, p in run["target"].named_parameters(remove_duplicate=False):
            first = owners[id(p)]
            if key != first and key in source and first in source and source[key] is not source[first]:
                raise InputError(
                    f"{name}: {key} and {first} are one weight in the target and two in the source: build the target "
                    "with a head of its own (tie_word_embeddings=False)"
                )
        return own, source

    def put(self, name: str, rule: Rule, shape: Sequence[int]) -> None:
        """Say how a parameter of the target, of this shape, is computed. Its maps must be there."""
        old = self._theirs[rule.source].shape
        new = [size if key is None else self.maps[key].shape[0] for size, key in zip(old, rule.maps, strict=True)]
        if tuple(new) != tuple(shape):
            raise ShapeError(
                f"{type(self).__name__}: the target's {name} is {tuple(shape)}, from the source's {rule.source} "
                f"{tuple(old)} comes {tuple(new)}: build the target so that the axes without a map are the source's"
            )
        self._rules[name] = rule

    def mapped(self, name: str) -> Tensor:
        """The source's parameter behind one of the target's, through its maps."""
        rule = self._rules[name]
        maps = [None if key is None else self.maps[key] for key in rule.maps]
        return along(self._theirs[rule.source].detach(), maps)

    def compose(self, target: nn.Module) -> dict[str, Tensor]:
        return {name: self.mapped(name) for name in self._rules}

    def thawed(self, target: nn.Module) -> list[nn.Parameter]:
        return [p for name, p in target.named_parameters() if name not in self._rules]

    def spectra(self, most: int = 8) -> dict[str, list[tuple[float, float]]]:
        """Singular values of the first computed matrices, relative to the largest: what the report shows."""
        found = {}
        with torch.no_grad():
            matrices = [name for name in self._rules if len(self._rules[name].maps) == 2]
            for name in matrices[:most]:
                values = torch.linalg.svdvals(self.mapped(name).float().cpu())
                found[name] = [(float(i), float(v / values[0].clamp_min(1e-12))) for i, v in enumerate(values, 1)]
        return found


def key_of(name: str, axis: int) -> str:
    """A name for a parameter's own map along an axis; dots mean modules to torch."""
    return f"{name.replace('.', '/')}:{axis}"

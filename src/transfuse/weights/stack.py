"""Layers of one checkpoint or several, one range after the other, as one network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from transfuse.core.errors import InputError, ShapeError
from transfuse.weights.checkpoint import Checkpoint, Spec
from transfuse.weights.folder import is_embedding

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""What configs call the number of layers."""


class Stacked(Checkpoint):
    """Ranges of layers, renumbered. Embeddings are the first checkpoint's; the last norm and the head, the last one's.

    Args:
        ranges: checkpoint, first layer, and the layer behind the last one, in the order of the new network.

    Raises:
        InputError: a checkpoint has no numbered layers or several stacks of them, or not so many.
        ShapeError: layers of two checkpoints do not fit.
    """

    def __init__(self, ranges: Sequence[tuple[Checkpoint, int, int]]):
        if not ranges:
            raise InputError("a stack needs at least one range of layers")
        first, last = ranges[0][0], ranges[-1][0]
        self.name = " + ".join(f"{checkpoint.name}[{start}:{end}]" for checkpoint, start, end in ranges)
        self.folder = first.folder
        prefix = layer_prefix(first)
        self._where: dict[str, tuple[Checkpoint, str]] = {}
        self._where |= {key: (first, key) for key in _outside(first, prefix) if is_embedding(key)}
        shapes: dict[str, Spec] = {}
        depth = 0
        for checkpoint, start, end in ranges:
            layers = _layers(checkpoint, prefix)
            if not 0 <= start < end <= len(layers):
                raise InputError(
                    f"{checkpoint.name} has layers 0 to {len(layers) - 1}, there is no range [{start}, {end}]"
                )
            for number in range(start, end):
                for rest in layers[number]:
                    key = f"{prefix}{number}{rest}"
                    spec = checkpoint.tensors[key]
                    if shapes.setdefault(rest, spec).shape != spec.shape and checkpoint is not first:
                        raise ShapeError(
                            f"{key} of {checkpoint.name} is {spec.shape}, that of {first.name} {shapes[rest].shape}: "
                            "layers of different widths cannot be stacked"
                        )
                    self._where[f"{prefix}{depth}{rest}"] = checkpoint, key
                depth += 1
        self._where |= {key: (last, key) for key in _outside(last, prefix) if not is_embedding(key)}
        self.tensors = {new: checkpoint.tensors[old] for new, (checkpoint, old) in self._where.items()}
        self.tied = {key: owner for key, owner in first.tied.items() if owner in self.tensors}
        self.config = _deeper(first.config, len(_layers(first, prefix)), depth, ranges)

    def read(self, key: str) -> Tensor:
        self.require(key)
        checkpoint, old = self._where[key]
        return checkpoint.read(old)


def layer_prefix(checkpoint: Checkpoint) -> str:
    """What stands before the numbers of layers in names, for instance `"model.layers."`.

    Raises:
        InputError: there are no numbered layers, or several stacks of them.
    """
    found = {match[1] for key in checkpoint.tensors if (match := re.match(r"((?:[^.\d][^.]*\.)*)(\d+)\.", key))}
    found = {prefix for prefix in found if prefix}
    if len(found) != 1:
        what = f"stacks of layers at {', '.join(sorted(found))}" if found else "no numbered layers"
        raise InputError(f"{checkpoint.name} has {what}: layers are stacked of networks with one stack of them")
    return found.pop()


def _layers(checkpoint: Checkpoint, prefix: str) -> list[list[str]]:
    """What stands behind the number, for each layer in order."""
    found: dict[int, list[str]] = {}
    for key in checkpoint.tensors:
        if match := re.match(re.escape(prefix) + r"(\d+)(\..*)", key):
            found.setdefault(int(match[1]), []).append(match[2])
    return [found[number] for number in sorted(found)]


def _outside(checkpoint: Checkpoint, prefix: str) -> list[str]:
    """Names that are in no layer."""
    return [key for key in checkpoint.tensors if not re.match(re.escape(prefix) + r"\d+\.", key)]


def _deeper(
    config: Mapping[str, Any] | None, before: int, depth: int, ranges: Sequence[tuple[Checkpoint, int, int]]
) -> dict[str, Any] | None:
    """The config with another number of layers; lists with an entry per layer are put together as the layers are."""
    if config is None:
        return None
    changed = dict(config)
    for name in DEPTHS:
        if name in changed:
            changed[name] = depth
    for name, value in config.items():
        if isinstance(value, list) and len(value) == before and name in (ranges[-1][0].config or {}):
            changed[name] = [entry for c, start, end in ranges for entry in (c.config or config)[name][start:end]]
    return changed

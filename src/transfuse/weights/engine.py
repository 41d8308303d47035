"""Merging checkpoints tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from transfuse.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transfuse.weights.base import Merge


def merged_state(method: Merge, base: Checkpoint, parents: Sequence[Checkpoint]) -> dict[str, Tensor]:
    """All merged tensors, in the base's types and with its tied names."""
    depths = depths_of(base)
    state: dict[str, Tensor] = {}
    for key, spec in base.tensors.items():
        ancestor, tensors = base.read(key), [parent.read(key) for parent in parents]
        if not spec.dtype.is_floating_point:
            state[key] = ancestor.clone()
            continue
        merged = method.at(key, depths[key]).merge(key, ancestor.float(), [t.float() for t in tensors])
        state[key] = merged.to(spec.dtype)
    return state | {key: state[owner] for key, owner in base.tied.items()}


def depths_of(checkpoint: Checkpoint) -> dict[str, float]:
    """Where in the network every tensor is: 0 before the first numbered layer and in it, 1 in the last and after it."""
    numbers = {key: int(found[1]) for key in checkpoint.tensors if (found := re.search(r"\.(\d+)\.", key))}
    last = max(numbers.values(), default=0)
    depths, passed = {}, False
    for key in checkpoint.tensors:
        passed = passed or key in numbers
        depths[key] = numbers[key] / last if key in numbers and last else float(passed)
    return depths

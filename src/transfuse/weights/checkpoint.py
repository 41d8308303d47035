"""Checkpoints as named tensors that are read one at a time, whatever they are kept in.

What changes a checkpoint before it is merged (rows in the order of another vocabulary, other layers, an adapter folded
in) is a :class:`View` of it, so that the engine knows one thing only: names, shapes, and `read`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.checkpoint import tied_names
from transfuse.core.errors import InputError, nearest


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Its size in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Checkpoint:
    """Named tensors of one parent.

    Attributes:
        name: for messages, cards and reports.
        tensors: what can be read, by name, in the order in which it is kept.
        tied: names that stand for the memory of another one, with that one's name; they are not in `tensors`.
        config: what a `config.json` beside the weights says, or None.
        folder: where tokenizer files and the like lie, or None.
    """

    name: str
    tensors: Mapping[str, Spec]
    tied: Mapping[str, str]
    config: Mapping[str, Any] | None = None
    folder: Path | None = None

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU, in the type in which it is kept. It may be shared: do not write to it.

        Raises:
            InputError: there is none of that name.
        """
        raise NotImplementedError

    @property
    def names(self) -> list[str]:
        """All that it has tensors for, tied names included."""
        return [*self.tensors, *self.tied]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def require(self, key: str) -> Spec:
        """What is known of a tensor; unknown names are answered with the nearest."""
        if key not in self.tensors:
            raise InputError(f"{self.name} has no tensor {key!r}: {nearest(key, self.tensors)}")
        return self.tensors[key]


class InMemory(Checkpoint):
    """A module, or a state dict, as a checkpoint. Nothing is copied."""

    def __init__(self, source: nn.Module | Mapping[str, Tensor], name: str | None = None):
        state = source.state_dict() if isinstance(source, nn.Module) else source
        strange = next((k for k, v in state.items() if not isinstance(v, Tensor)), None)
        if strange is not None:
            raise InputError(
                f"{name or 'a state dict'} holds {strange!r}, a {type(state[strange]).__name__}: expected tensors"
            )
        self.name = name or type(source).__name__
        self.tied = tied_names(state)
        self._state = {k: v.detach() for k, v in state.items() if k not in self.tied}
        self.tensors = {k: Spec(tuple(v.shape), v.dtype) for k, v in self._state.items()}
        config: Any = getattr(source, "config", None)
        self.config = config.to_dict() if hasattr(config, "to_dict") else None

    def read(self, key: str) -> Tensor:
        self.require(key)
        return self._state[key].cpu()


class View(Checkpoint):
    """A checkpoint seen otherwise; by itself it changes nothing. Subclasses change `tensors` and `read`."""

    def __init__(self, inner: Checkpoint):
        self.inner = inner
        self.name, self.tensors, self.tied = inner.name, inner.tensors, inner.tied
        self.config, self.folder = inner.config, inner.folder

    def read(self, key: str) -> Tensor:
        return self.inner.read(key)

"""What a model gives back, read once and the same for every kind of model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from transfuse.core.errors import CapabilityError, InputError, LayerError
from transfuse.losses.scores import Projection, Sampled, Scores, Target, TopK, positions


class Features(dict[str, Any]):
    """What the taps of one forward pass read; asking for one that read nothing is an error."""

    def __missing__(self, name: str) -> Any:
        raise LayerError(
            f"the layer {name!r} was not run in this forward pass, so it has no feature. A model that was compiled "
            "and called before cannot be tapped: compile it anew; else tap a layer that every pass runs"
        )


@dataclass(slots=True)
class Outputs:
    """The result of one forward pass.

    Attributes:
        raw: exactly what the model returned; None where the pass was stopped at a layer; a :class:`Projection` where
            a language model's output layer was left for the loss to apply; a sparse target where a source was read
            from a store.
        features: what the taps read, under the names that were asked for; a wildcard gives a list.
    """

    raw: Any
    features: dict[str, Any] = field(default_factory=Features)

    @property
    def logits(self) -> Tensor:
        """The logits in float32, `(batch, classes)`, `(batch, tokens, vocabulary)` or `(batch, classes, h, w)`.

        Raises:
            InputError: the model returned something in which no logits can be found.
            CapabilityError: of a stored distribution only a part was kept.
        """
        if isinstance(self.raw, TopK | Sampled):
            raise CapabilityError(
                f"this source kept {type(self.raw).__name__} targets, and full logits are needed here: use a method "
                "that `transfuse methods --teacher topk` (or sampled) lists, or a store of full logits"
            )
        if isinstance(self.raw, Projection):  # once, for several parts of a loss may ask
            self.raw = self.raw.dense()
        return full_precision(find_logits(self.raw))

    def logits_at(self, mask: Tensor | None) -> Tensor:
        """The logits in float32 of the positions that count, `(rows, classes)`; no others are computed.

        Args:
            mask: `(batch,)` or `(batch, tokens)`; None counts all.
        """
        rows = positions(self.learning, mask)
        return full_precision(rows.dense()) if isinstance(rows, Projection) else rows

    @property
    def scores(self) -> Target:
        """What :func:`transfuse.losses.match` takes: logits, or what stands for them and is cheaper."""
        return self.raw if isinstance(self.raw, Projection | TopK | Sampled) else self.logits

    @property
    def learning(self) -> Scores:
        """The same of a model that learns: a whole distribution.

        Raises:
            CapabilityError: only a part of one was kept, as by a store, and no gradient can reach it.
        """
        return self.raw if isinstance(self.raw, Projection) else self.logits

    def on_samples(self, change: Callable[[Tensor], Tensor]) -> Outputs:
        """The same with something done to every tensor that has one entry per sample: rows chosen, the graph cut."""
        raw = self.raw
        if isinstance(raw, Projection | TopK | Sampled):
            raw = raw.on_samples(change)
        elif raw is not None:
            raw = change(find_logits(raw))

        def changed(value: Any) -> Any:
            return [changed(v) for v in value] if isinstance(value, list) else change(value)

        return Outputs(raw, Features({name: changed(value) for name, value in self.features.items()}))


def find_logits(raw: Any) -> Tensor:
    """The logits in what a model returned: a tensor, an object or mapping with `logits`, or a tuple's first."""
    if isinstance(raw, Tensor):
        return raw
    if isinstance(raw, Mapping) and isinstance(raw.get("logits"), Tensor):
        return raw["logits"]
    if isinstance(getattr(raw, "logits", None), Tensor):
        return raw.logits
    if isinstance(raw, tuple | list) and raw and isinstance(raw[0], Tensor):
        return raw[0]
    has = f" with {', '.join(map(str, raw))}" if isinstance(raw, Mapping) else ""
    raise InputError(
        f"no logits in what the model returned, a {type(raw).__name__}{has}: "
        "expected a tensor, something with 'logits', or a tuple whose first element is a tensor; "
        "wrap the model in an nn.Module that returns its logits"
    )


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Put every layer back into the mode (train or eval) in which it was."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def full_precision(tensor: Tensor) -> Tensor:
    """Half-precision numbers as float32, which losses are computed in; others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def eager(model: nn.Module) -> nn.Module:
    """A model without the compiled wrapper: what runs before taps are in place must not compile it without them."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def call(model: nn.Module, inputs: Any, params: Mapping[str, Tensor] | None = None, task: Tensor | None = None) -> Any:
    """Call a model the way its inputs ask for: `model(**inputs)` for a mapping, else `model(inputs)`.

    A mapping with a single entry whose name `forward` does not know is passed by position, so that
    `{"image": tensor}` fits any vision model.

    Args:
        params: parameters and buffers to use in the place of the model's own.
        task: `(batch,)`, the same for all; told, as a number, to a model whose `forward` has a parameter `task`.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if not isinstance(inputs, Mapping):
        args = (inputs,)
    elif len(inputs) == 1 and not _accepts(type(model).forward, next(iter(inputs))):
        args = tuple(inputs.values())
    else:
        kwargs = dict(inputs)
    if task is not None and "task" in inspect.signature(type(model).forward).parameters:
        kwargs["task"] = int(task[0])
    return model(*args, **kwargs) if params is None else functional_call(model, dict(params), args, kwargs)


@lru_cache(maxsize=256)
def _accepts(forward: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

"""Read, replace or stop at the layers of a model, by name, without touching the model.

A tap is a module path (`"layer3"`), the input of a module (`"layer3:input"`), a wildcard
(`"blocks.*"`, a list of features), a unique suffix of a path (`"layer3"` finds `"module.layer3"`, so models
wrapped by DDP or PEFT keep their names), or a role: `"penultimate"` is the input of the last linear layer,
`"class_maps"` what that layer says at every position of the map it averages (see `class_maps.py`), `"batchnorm"`
the inputs of all batch-normalisation layers (a list, in the order of :func:`batch_norms`).
Hooks exist before the first call (compiled models ignore later ones), stay silent unless opened, and are
gone when the taps are removed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.class_maps import CLASS_MAPS, ClassMapHead, class_maps, find_class_map_head
from transfuse.core.errors import LayerError, nearest
from transfuse.core.outputs import Features, call, find_logits, modes_kept

PENULTIMATE = "penultimate"
BATCH_NORM = "batchnorm"
Swap = Mapping[str, Tensor | Callable[[Tensor], Tensor]]


class Stopped(Exception):  # noqa: N818 - a signal, not an error
    """Raised inside a forward pass that was asked to stop at a layer."""


class Taps:
    """The taps of one model.

    Args:
        model: the model to read.
        names: taps as they were asked for; features come back under these names.
        inputs: one batch of inputs, needed where a role must be traced.

    Raises:
        LayerError: a name fits no layer (the nearest are named) or several.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], inputs: Any = None):
        self.paths: dict[str, list[str]] = {}
        head: ClassMapHead | None = None
        for name in dict.fromkeys(names):
            if name == CLASS_MAPS:
                head, self.paths[name] = find_class_map_head(model, inputs), [CLASS_MAPS]
            else:
                self.paths[name] = _resolve_role(model, name, inputs) or resolve(model, name)
        self._read: dict[str, Tensor] | None = None
        self._swap: dict[str, Tensor | Callable[[Tensor], Tensor]] = {}
        self._until: str | None = None
        modules = dict(model.named_modules())
        self._handles = []
        read = [p for paths in self.paths.values() for p in paths if p != CLASS_MAPS]
        for path in dict.fromkeys([*read, head.features] if head else read):
            layer, _, side = path.partition(":")
            if side:
                hook = modules[layer].register_forward_pre_hook(self._before(path), with_kwargs=True)
            else:
                hook = modules[layer].register_forward_hook(self._after(path))
            self._handles.append(hook)
        if head:
            self._handles.append(modules[head.linear].register_forward_hook(self._class_maps(head)))

    @contextmanager
    def open(self, swap: Swap | None = None, until: str | None = None) -> Iterator[Features]:
        """Let the taps read during one forward pass; the dict that is yielded is filled when the block ends.

        Args:
            swap: activations to put in the place of a tap's own: a tensor, or a function of the tensor.
            until: stop the forward pass after this tap.
        """
        features = Features()
        self._read = {}
        self._swap = {self._single(name): value for name, value in (swap or {}).items()}
        self._until = None if until is None else self._single(until)
        try:
            yield features
            for name, paths in self.paths.items():
                found = [self._read[p] for p in paths if p in self._read]
                if "*" in name or name == BATCH_NORM:
                    features[name] = found
                elif found:
                    features[name] = found[0]
        finally:
            self._read, self._swap, self._until = None, {}, None

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _single(self, name: str) -> str:
        if name not in self.paths:
            raise LayerError(
                f"{name!r} is not among the taps this method asked for in wants(): {', '.join(self.paths)}"
            )
        if name == CLASS_MAPS:
            raise LayerError("class maps are computed on the side: they can be read, but not replaced or stopped at")
        if len(self.paths[name]) != 1:
            raise LayerError(f"{name!r} stands for {len(self.paths[name])} layers, one is needed here")
        return self.paths[name][0]

    def _visit(self, path: str, value: Tensor) -> Tensor:
        assert self._read is not None
        if path in self._swap:
            replacement = self._swap[path]
            value = replacement(value) if callable(replacement) else replacement
        self._read[path] = value
        return value

    def _after(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if self._read is None:
                return None
            seen = self._visit(path, _tensor(output, path))
            if path == self._until:
                raise Stopped
            return _with_tensor(output, seen) if path in self._swap else None

        return hook

    def _class_maps(self, head: ClassMapHead) -> Callable[..., Any]:
        def hook(module: nn.Linear, args: Any, output: Any) -> None:
            if self._read is not None:  # the weight at hand, be it the model's or one it was called with
                self._read[CLASS_MAPS] = class_maps(self._read[head.features], module.weight)

        return hook

    def _before(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._read is None:
                return None
            if args:
                seen = self._visit(path, _tensor(args[0], path))
                args = (seen, *args[1:])
            else:
                name = next(iter(kwargs))
                kwargs = {**kwargs, name: self._visit(path, _tensor(kwargs[name], path))}
            if path == self._until:
                raise Stopped
            return (args, kwargs) if path in self._swap else None

        return hook


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The batch-normalisation layers that keep running statistics, by path, in the model's order."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return {path: layer for path, layer in layers.items() if layer.running_mean is not None}


def _resolve_role(model: nn.Module, name: str, inputs: Any) -> list[str] | None:
    """The paths of a role; None where the name is no role, or is the name of a layer after all."""
    if name == PENULTIMATE:
        return [trace_penultimate(model, inputs)]
    if name == BATCH_NORM and (layers := batch_norms(model)):
        return [path + ":input" for path in layers]
    return None


def resolve(model: nn.Module, name: str) -> list[str]:
    """The full paths that a tap's name stands for, in the model's order.

    Raises:
        LayerError: none or several fit.
    """
    layer, colon, side = name.partition(":")
    if side not in ("", "input"):
        raise LayerError(f"unknown tap {name!r}: after a layer's name only ':input' is possible")
    paths = [path for path, _ in model.named_modules() if path]
    tail = r"[^.]+".join(map(re.escape, layer.split("*")))
    fits = {p: match[1] for p in paths if (match := re.fullmatch(rf"(.*\.)?{tail}", p))}
    wrappers = {None} if None in fits.values() else set(fits.values())
    if len(wrappers) > 1:
        raise LayerError(
            f"the layer {layer!r} is ambiguous in {type(model).__name__}: {', '.join([*fits][:6])}; give a longer path"
        )
    found = [p for p, wrapper in fits.items() if wrapper in wrappers]
    if not found:
        raise LayerError(f"{type(model).__name__} has no layer {layer!r}: {nearest(layer, paths)}")
    return [p + colon + side for p in found]


@torch.no_grad()
def trace_penultimate(model: nn.Module, inputs: Any) -> str:
    """The tap at the input of the last linear layer, found by running one batch.

    Raises:
        LayerError: the model ran through no linear layer that gives its logits.
    """
    seen: list[tuple[str, Tensor]] = []
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_hook(lambda _m, _a, output, name=n: seen.append((name, output))) for n, m in linear]
    try:
        with modes_kept(model):
            logits = find_logits(call(model.eval(), inputs))
    finally:
        for handle in handles:
            handle.remove()
    head = [name for name, output in seen if output.shape[-1] == logits.shape[-1]]
    if not head:
        raise LayerError(
            f"{type(model).__name__} has no linear layer that gives its {logits.shape[-1]} logits, so the role "
            f"'{PENULTIMATE}' is undefined; name a layer instead"
        )
    return head[-1] + ":input"


def _tensor(value: Any, path: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
        return value[0]
    hidden = getattr(value, "last_hidden_state", None)
    if isinstance(hidden, Tensor):
        return hidden
    raise LayerError(f"the layer {path!r} gives a {type(value).__name__}, not a tensor; tap a layer inside it")


def _with_tensor(output: Any, tensor: Tensor) -> Any:
    if isinstance(output, tuple):
        return (tensor, *output[1:])
    if isinstance(output, list):
        return [tensor, *output[1:]]
    return tensor

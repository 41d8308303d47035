"""The smallest structures that can be taken out of a transformer: hidden channels and attention heads.

A :class:`Node` is all structures of one kind in one layer. Each of its groups is a set of rows and columns of several
parameters that are only of use together: the row of a hidden channel in every matrix that computes it and its column in
the matrix that reads it; query, key and value rows of a head and the columns of its output. Where several query heads
share a key and a value (GQA) they are one group. The width of the residual stream is never touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError

KINDS = ("channel", "head")
UP, DOWN = ("gate_proj", "up_proj"), "down_proj"
"""Names of the layers of a gated perceptron in Llama and its like."""


@dataclass(frozen=True)
class Part:
    """What the groups of a node own of one parameter.

    Attributes:
        name: of the parameter; `dim`: 0 for rows, 1 for columns. index: `(groups, k)` the rows or columns of each.
    """

    name: str
    dim: int
    index: Tensor

    def take(self, tensor: Tensor, groups: Tensor) -> Tensor:
        """The entries of some groups, `(groups, k, ...)`."""
        return tensor.movedim(self.dim, 0)[self.index[groups].to(tensor.device)]

    def put(self, tensor: Tensor, groups: Tensor, values: Tensor | float) -> None:
        """Write them, in place."""
        rows = self.index[groups].to(tensor.device)
        tensor.movedim(self.dim, 0)[rows] = values if isinstance(values, Tensor) else tensor.new_tensor(values)


@dataclass(frozen=True)
class Node:
    """All structures of one kind in one layer.

    Attributes:
        name: path of the module they are in; `kind`: one of `KINDS`. parts: what they own.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]

    @property
    def count(self) -> int:
        """How many groups it has."""
        return len(self.parts[0].index)

    def vectors(self, tensors: Mapping[str, Tensor], groups: Tensor) -> Tensor:
        """Everything that some groups own, in float32, `(groups, n)`."""
        return torch.cat([part.take(tensors[part.name], groups).flatten(1).float() for part in self.parts], 1)

    def write(self, tensors: Mapping[str, Tensor], groups: Tensor, vectors: Tensor) -> None:
        """Write :meth:`vectors` back, in place."""
        sizes = [part.take(tensors[part.name], groups).shape for part in self.parts]
        pieces = vectors.split([shape[1:].numel() for shape in sizes], 1)
        for part, shape, piece in zip(self.parts, sizes, pieces, strict=True):
            part.put(tensors[part.name], groups, piece.reshape(shape).to(tensors[part.name].dtype))


def find_structures(model: nn.Module) -> list[Node]:
    """Every node of a model, in its order.

    Known are the layers of Hugging Face decoders of Llama's kind (`q_proj`, `k_proj`, `v_proj`, `o_proj`; `gate_proj`,
    `up_proj`, `down_proj`) and blocks with `qkv`, `proj` and `heads`, and `fc1` and `fc2`, as in `transfuse.models`.

    Raises:
        InputError: there is none.
    """
    nodes = [node for name, m in model.named_modules() if (node := _attention(name, m) or _perceptron(name, m))]
    if not nodes:
        raise InputError(
            f"{type(model).__name__} has no structures that are known: attention of q_proj, k_proj, v_proj, o_proj (or "
            "qkv, proj), perceptrons of gate_proj, up_proj, down_proj (or fc1, fc2), all of them plain linear layers"
        )
    return nodes


@contextmanager
def zeroed(model: nn.Module, node: Node, groups: Tensor) -> Iterator[None]:
    """Within the block some groups of a node are zero; afterwards every bit is as it was."""
    params = dict(model.named_parameters())
    saved = [part.take(params[part.name].detach(), groups).clone() for part in node.parts]
    try:
        with torch.no_grad():
            for part in node.parts:
                part.put(params[part.name].data, groups, 0.0)
        yield
    finally:
        with torch.no_grad():
            for part, values in zip(node.parts, saved, strict=True):
                part.put(params[part.name].data, groups, values)


@torch.no_grad()
def shrink(model: nn.Module, kept: Mapping[str, Tensor | Sequence[int]]) -> nn.Module:
    """Take structures out of a model, in place: matrices get smaller, sizes and the configuration say so.

    Where all layers keep as many, `config` is that of an ordinary smaller model. Where not, it cannot say it, and
    `config.structures` holds the number by node, with which `shrink(new, {name: range(number)})` makes a model that the
    weights fit.

    Args:
        kept: by node, which groups stay; nodes that are not named stay whole.

    Raises:
        InputError: a node is unknown, or would be left without a group.
    """
    nodes = {node.name: node for node in find_structures(model)}
    for name, groups in kept.items():
        if name not in nodes:
            raise InputError(f"no structures are called {name!r}; there are {', '.join(nodes)}")
        node, stay = nodes[name], torch.as_tensor(list(groups), dtype=torch.long).sort().values
        if not len(stay):
            raise InputError(f"nothing would be left of {name}: keep at least one {node.kind}")
        if len(stay) < node.count:
            _cut(model, node, stay)
    _rewrite(model)
    return model


def _cut(model: nn.Module, node: Node, stay: Tensor) -> None:
    for part in node.parts:
        path, _, which = part.name.rpartition(".")
        layer: Any = model.get_submodule(path)
        old = getattr(layer, which)
        rows = part.index[stay].flatten().sort().values.to(old.device)
        setattr(layer, which, nn.Parameter(old.index_select(part.dim, rows), requires_grad=old.requires_grad))
        if which == "weight":
            layer.out_features, layer.in_features = layer.weight.shape
    if node.kind == "head":
        owner: Any = model.get_submodule(node.name)
        for attribute in ("heads", "num_heads", "num_key_value_heads"):
            if hasattr(owner, attribute):
                setattr(owner, attribute, getattr(owner, attribute) * len(stay) // node.count)


def _rewrite(model: nn.Module) -> None:
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "num_attention_heads"):
        return
    nodes = find_structures(model)
    heads = {_heads(model.get_submodule(n.name)) for n in nodes if n.kind == "head"}
    channels = {n.count for n in nodes if n.kind == "channel"}
    if len(heads) <= 1 and len(channels) <= 1:
        for queries, keys, size in heads:
            config.num_attention_heads, config.num_key_value_heads, config.head_dim = queries, keys, size
        for count in channels:
            config.intermediate_size = count
    else:
        config.structures = {node.name: node.count for node in nodes}


def _heads(attention: Any) -> tuple[int, int, int]:
    """Query heads, key heads, and their size."""
    size = int(attention.head_dim)
    return attention.q_proj.out_features // size, attention.k_proj.out_features // size, size


def _attention(name: str, m: Any) -> Node | None:
    if _linear(m, "q_proj", "k_proj", "v_proj", "o_proj") and hasattr(m, "head_dim"):
        queries, keys, size = _heads(m)
        whole, shared = torch.arange(queries * size).view(keys, -1), torch.arange(keys * size).view(keys, -1)
        parts = [*_rows(m, name, "q_proj", whole), *_rows(m, name, "k_proj", shared), *_rows(m, name, "v_proj", shared)]
        return Node(name, "head", (*parts, Part(f"{name}.o_proj.weight", 1, whole)))
    if _linear(m, "qkv", "proj") and hasattr(m, "heads"):
        columns = torch.arange(m.proj.in_features).view(m.heads, -1)
        rows = torch.cat([columns + i * m.proj.in_features for i in range(3)], 1)
        return Node(name, "head", (*_rows(m, name, "qkv", rows), Part(f"{name}.proj.weight", 1, columns)))
    return None


def _perceptron(name: str, m: Any) -> Node | None:
    for into, out in ((UP, DOWN), (("fc1",), "fc2")):
        if _linear(m, *into, out):
            index = torch.arange(getattr(m, out).in_features)[:, None]
            parts = [part for layer in into for part in _rows(m, name, layer, index)]
            return Node(name, "channel", (*parts, Part(f"{name}.{out}.weight", 1, index)))
    return None


def _rows(m: Any, name: str, layer: str, index: Tensor) -> list[Part]:
    found = [Part(f"{name}.{layer}.weight", 0, index)]
    return found if getattr(m, layer).bias is None else [*found, Part(f"{name}.{layer}.bias", 0, index)]


def _linear(m: nn.Module, *names: str) -> bool:
    return all(type(getattr(m, name, None)) is nn.Linear for name in names)

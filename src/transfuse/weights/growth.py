"""A small transformer's weights in the shapes of a larger one: wider, deeper, with nearly or exactly the same function.

Width: every new unit copies an old one, by one map for the whole residual stream and one for each layer's heads and
perceptron; whoever reads copies divides by their number. Depth: every new layer copies an old one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError, ShapeError
from transfuse.weights.layout import Layer, groups_of, heads_of, layers_of, transposed
from transfuse.weights.maps import Copies, along, counterparts, interpolated, stacked

Kind = Literal["circular", "random"]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Growth:
    """How a model grows; see :class:`~transfuse.weights.ScaleUp` for what each means."""

    operator: Literal["aki", "fpi"] = "aki"
    depth: Literal["interpolation", "stacking"] = "interpolation"
    mapping: Kind = "circular"
    scope: Literal["inner", "all"] = "inner"
    consumer: Literal["own", "next"] = "own"
    identity: bool = False
    norm_exact: bool = False


def copied(old: int, new: int, mapping: Kind = "circular", draw: torch.Generator | None = None) -> Tensor:
    """Which of the old units each new one copies, `(new,)`: the first are themselves.

    Raises:
        InputError: there would be fewer.

    >>> copied(3, 7)
    tensor([0, 1, 2, 0, 1, 2, 0])
    """
    if new < old:
        raise InputError(f"{old} units cannot grow to {new}: the target must not be smaller than the source")
    if mapping == "random":
        return torch.cat([torch.arange(old), torch.randint(old, (new - old,), generator=draw)])
    return torch.arange(new) % old


def shared_out(index: Tensor) -> Copies:
    """The map of whoever reads copies: each is divided by how many there are of it."""
    return Copies(index, 1 / index.bincount()[index])


def fpi(weight: Tensor, reads: Tensor | None, writes: Tensor | None) -> Tensor:
    """Function-preserving initialisation of a matrix `(out, in)`.

    Args:
        reads, writes: which old input and output each new one copies, :func:`copied`; None keeps that side.
    """
    return along(weight, [None if writes is None else Copies(writes), None if reads is None else shared_out(reads)])


def aki(weight: Tensor, following: Tensor, old: int) -> Tensor:
    """Advanced knowledge initialisation: rows from `old` on come from the next layer's, both grown by :func:`fpi`."""
    return torch.cat([weight[:old], following[old:]])


@torch.no_grad()
def grown(source: nn.Module, target: nn.Module, how: Growth, draw: torch.Generator | None = None) -> Tensors:
    """The parameters of the target, by name, made from those of the source, on the CPU.

    Args:
        draw: for the random mapping.

    Raises:
        InputError: the target is smaller in something, its heads are of another size, or its key and value heads do
            not fit those of the source.
        ShapeError: a parameter beside the blocks does not fit.
    """
    old, new = layers_of(source), layers_of(target)
    if len(new) < len(old):
        raise InputError(f"{len(old)} layers cannot grow to {len(new)}: the target must not be smaller than the source")
    schedule = (interpolated if how.depth == "interpolation" else stacked)(len(old), len(new))
    stream = _stream(source, target, old[0], new[0], how, draw)
    blocks = _blocks(source, target, old, new, how, draw, stream)
    found: Tensors = {}
    for j, (layer, i) in enumerate(zip(new, schedule, strict=True)):
        copy = how.identity and i in schedule[:j]
        for path, (weight, bias) in zip(_paths(layer), blocks(i), strict=True):
            silent = copy and path in (layer.output, layer.down)
            flipped = weight.T if transposed(target.get_submodule(path)) else weight
            found[f"{path}.weight"] = flipped * 0 if silent else flipped
            if bias is not None:
                found[f"{path}.bias"] = bias * 0 if silent else bias
    theirs = {name: p.cpu() for name, p in source.named_parameters(remove_duplicate=False)}
    own = dict(target.named_parameters())
    names, last = counterparts(own, theirs, schedule), _norm_before_tied_head(target, new)
    for name, p in own.items():
        if name not in found:
            if names[name] not in theirs:
                raise ShapeError(f"the source has no parameter {names[name]!r} for the target's {name}")
            owner = name.rpartition(".")[0]
            found[name] = stream.beside(target.get_submodule(owner), name, theirs[names[name]], p)
            if owner == last:
                assert stream.reads.scale is not None
                found[name] = found[name] * stream.reads.scale
        if found[name].shape != p.shape:
            raise ShapeError(
                f"the target's {name} is {tuple(p.shape)}, grown from the source it would be "
                f"{tuple(found[name].shape)}: build both from one class, with the same vocabulary and context"
            )
    return {name: found[name] for name in own}


def exact_eps(source: nn.Module, target: nn.Module) -> float:
    """By what the epsilon of every norm is multiplied for an exact growth in width: floor(n' / n) n / n'."""
    old, new = (_sides(m, layers_of(m)[0].rise[0])[1] for m in (source, target))
    return new // old * old / new


def _norm_before_tied_head(model: nn.Module, layers: list[Layer]) -> str | None:
    """Where the output layer is the embedding, which is not divided by the copies, the norm before it has to be."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if not any(isinstance(m, nn.Linear) and id(m.weight) in embeddings for m in model.modules()):
        return None
    inside = tuple(layer.block + "." for layer in layers)
    norms = [path for path, m in model.named_modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 1]
    return [path for path in norms if not path.startswith(inside)][-1]


# The residual stream


@dataclass(frozen=True)
class Stream:
    """The one map that all share who write into the residual stream, and who read it."""

    old: int
    writes: Copies
    reads: Copies
    scale: Copies
    shift: Copies

    def beside(self, module: nn.Module, name: str, weight: Tensor, p: Tensor) -> Tensor:
        """A parameter outside the blocks' linear layers: embeddings, norms, the head."""
        if isinstance(module, nn.Embedding):
            return along(weight, [None, self.writes])
        if weight.dim() == 1 and weight.shape[0] == self.old and p.shape[0] == self.reads.index.shape[0]:
            return along(weight, [self.shift if name.endswith("bias") else self.scale])
        if isinstance(module, nn.Linear) and weight.dim() == 2:
            return along(weight, [None, self.reads])
        if weight.dim() > 2 and weight.shape[-1] == self.old:
            return along(weight, [*[None] * (weight.dim() - 1), self.writes])
        return weight.clone()


def _stream(
    source: nn.Module, target: nn.Module, old: Layer, new: Layer, how: Growth, draw: torch.Generator | None
) -> Stream:
    n, m = _sides(source, old.rise[0])[1], _sides(target, new.rise[0])[1]
    if not how.norm_exact or m < n:
        index = copied(n, m, how.mapping, draw)
        return Stream(n, Copies(index), shared_out(index), Copies(index), Copies(index))
    times, rest = divmod(m, n)
    index = torch.cat([torch.arange(n).repeat(times), torch.zeros(rest, dtype=torch.long)])
    real = (torch.arange(m) < times * n).float()
    centred = any(isinstance(module, nn.LayerNorm) for module in source.modules())
    # What is left over must not change the norm's statistics: the mean does not move a variance, 0 no mean square.
    writes = Copies(index[: times * n], averaged=rest) if centred else Copies(index, real)
    scale = Copies(index, real * exact_eps(source, target) ** 0.5)
    return Stream(n, writes, Copies(index, real / times), scale, Copies(index, real))


# The blocks


def _blocks(
    source: nn.Module,
    target: nn.Module,
    old: list[Layer],
    new: list[Layer],
    how: Growth,
    draw: torch.Generator | None,
    stream: Stream,
) -> Callable[[int], list[tuple[Tensor, Tensor | None]]]:
    """A function that widens the linear layers of a block of the source, `[(weight (out, in), bias), ...]`."""
    heads, fresh_heads = _heads(source, target, old[0], new[0], how, draw)
    inner, wide = _sides(source, old[0].rise[0])[0], _sides(target, new[0].rise[0])[0]
    units = [copied(inner, wide, how.mapping, draw) for _ in old]
    fresh_units = torch.arange(wide) >= inner
    fresh_stream = torch.arange(stream.reads.index.shape[0]) >= stream.old

    @cache
    def alone(i: int) -> list[tuple[Tensor, Tensor | None]]:
        """Function-preserving."""
        maps: list[tuple[Copies, Copies]] = []
        maps += [(Copies(index), stream.reads) for index in _rows(old[i], heads)]
        maps += [(stream.writes, shared_out(heads[0]))]
        maps += [(Copies(units[i]), stream.reads)] * len(old[i].rise)
        maps += [(stream.writes, shared_out(units[i]))]
        found = []
        for path, (writes, reads) in zip(_paths(old[i]), maps, strict=True):
            weight, bias = _linear(source.get_submodule(path))
            found.append((along(weight, [writes, reads]), None if bias is None else along(bias, [writes])))
        return found

    def widened(i: int) -> list[tuple[Tensor, Tensor | None]]:
        if how.operator == "fpi" or i + 1 == len(old):
            return alone(i)
        a = len(old[i].attention)
        rows = [*_rows(old[i], fresh_heads), None, *[fresh_units] * len(old[i].rise), None]
        found = []
        for k, ((weight, bias), (after, bias_after)) in enumerate(zip(alone(i), alone(i + 1), strict=True)):
            fresh = rows[k]
            if fresh is None:  # it writes into the stream
                if how.consumer == "next":
                    weight = torch.where(fresh_heads[0] if k == a else fresh_units, after, weight)
                fresh = fresh_stream if how.scope == "all" else torch.zeros_like(fresh_stream)
            weight = torch.where(fresh[:, None], after, weight)
            if bias is not None and bias_after is not None:
                bias = torch.where(fresh, bias_after, bias)
            found.append((weight, bias))
        return found

    return widened


def _heads(
    source: nn.Module, target: nn.Module, old: Layer, new: Layer, how: Growth, draw: torch.Generator | None
) -> tuple[list[Tensor], list[Tensor]]:
    """For the rows of query, key and value: which old row each copies, and which are new."""
    counts = [heads_of(source), heads_of(target), groups_of(source), groups_of(target)]
    if any(count is None for count in counts):
        raise InputError("the models do not say how many heads they have: expected a config, or an attribute `heads`")
    h, H, g, G = (int(c) for c in counts if c is not None)
    size, Size = _sides(source, old.output)[1] // h, _sides(target, new.output)[1] // H
    if size != Size:
        raise InputError(f"heads of size {size} cannot become heads of size {Size}: grow by whole heads")
    if h > H or H % G or h % g:
        raise InputError(f"{h} heads in {g} groups cannot grow to {H} in {G}")
    if g == G:  # new query heads stay in their group, whose keys and values are as they were
        within = copied(h // g, H // g, how.mapping, draw)
        query = (torch.arange(g)[:, None] * (h // g) + within).flatten()
        fresh = (torch.arange(H // g) >= h // g).repeat(g)
        keys, fresh_keys = torch.arange(g), torch.zeros(g, dtype=torch.bool)
    elif g == h and G == H:
        query = keys = copied(h, H, how.mapping, draw)
        fresh = fresh_keys = torch.arange(H) >= h
    else:
        raise InputError(f"the source shares keys and values in {g} groups, the target in {G}: their number must stay")

    def rows(heads: Tensor) -> Tensor:
        return (heads[:, None] * size + torch.arange(size)).flatten()

    index = [rows(query), rows(keys), rows(keys)]
    return index, [fresh.repeat_interleave(size), *[fresh_keys.repeat_interleave(size)] * 2]


def _rows(layer: Layer, parts: list[Tensor]) -> list[Tensor]:
    """Of query, key and value, each a layer or all of them in one."""
    if len(layer.attention) == 3:
        return parts
    if parts[0].dtype == torch.bool:
        return [torch.cat(parts)]
    sizes = [int(p.max()) + 1 for p in parts]
    return [torch.cat([p + sum(sizes[:i]) for i, p in enumerate(parts)])]


def _paths(layer: Layer) -> list[str]:
    return [*layer.attention, layer.output, *layer.rise, layer.down]


def _linear(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight `(out, in)` and bias, however the layer stores them, on the CPU as the maps are."""
    weight = module.weight.T if transposed(module) else module.weight
    return weight.detach().cpu(), None if module.bias is None else module.bias.detach().cpu()


def _sides(model: nn.Module, path: str) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    weight = _linear(model.get_submodule(path))[0]
    return weight.shape[0], weight.shape[1]


def load(target: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into the parameters of these names."""
    with torch.no_grad():
        for name, p in target.named_parameters():
            p.copy_(tensors[name])

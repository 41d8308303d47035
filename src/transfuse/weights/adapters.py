"""The adapter bank: bottleneck adapters at named layers of any model, alone or several combined per layer.

    h = layer(x)
    z_n = W_up,n relu(W_down,n h + b_down,n) + b_up,n               the adapter's output, without any residual
    out = h + combine(h, z_1, ..., z_N)                             the block adds its own residual to that

PEFT has low-rank and prompt methods, and no bottleneck adapters behind a layer, so these are the library's own. They
are modules in the place of layers, not hooks: what is deployed is a plain model, saved and loaded like any other.
A bank is the models that :class:`BottleneckAdapter` gives, one per task, on one backbone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.head import head_of
from transfuse.core.labels import labels_term
from transfuse.core.method import Method
from transfuse.core.outputs import call, eager
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.taps import Taps, resolve

MANY = 50
"""Adapters per layer above which the user is warned: all of them run for every token."""


class Bottleneck(nn.Module):
    """`up(relu(down(h)))` on the last axis, without a residual; weights N(0, 0.02), biases 0 at first."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, h: Tensor) -> Tensor:
        return self.up(self.down(h).relu())


class Adapted(nn.Module):
    """A layer with one adapter, or several and what combines them.

    Args:
        layer: whose output `h` `(..., dim)` is adapted.
        adapters: one or more.
        combine: from `h` and all outputs `(adapters, ..., dim)` to what is added to `h`; None where there is one.
    """

    def __init__(self, layer: nn.Module, adapters: Iterable[nn.Module], combine: nn.Module | None = None):
        super().__init__()
        self.layer, self.adapters, self.combine = layer, nn.ModuleList(adapters), combine

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        h = self.layer(*args, **kwargs)
        outputs = [adapter(h) for adapter in self.adapters]
        return h + (outputs[0] if self.combine is None else self.combine(h, torch.stack(outputs)))


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The :class:`Adapted` layers of a model by the path that the layer itself has in the backbone."""
    return {path: m for path, m in eager(model).named_modules() if isinstance(m, Adapted)}


def with_adapters(model: nn.Module, layers: str | Sequence[str], reduction: int, inputs: Any) -> nn.Module:
    """A copy of a model with a new adapter behind each of some layers; load the weights of a saved one into it.

    Args:
        layers: taps of the layers, for instance `"blocks.*.mlp"`, or `"encoder.layer.*.output.dense"`.
        reduction: the bottleneck is the layer's width divided by it.
        inputs: one batch, from which widths are read.

    Raises:
        InputError: a layer gives no tensor of features, or is narrower than `reduction`; there are adapters already.
    """
    copied = copy.deepcopy(eager(model))
    insert(copied, {path: ([Bottleneck(dim, dim // reduction)], None) for path, dim in _widths(model, layers, inputs)})
    if any(adapted.adapters[0].down.out_features == 0 for adapted in adapted_layers(copied).values()):
        raise InputError(f"a layer is narrower than reduction={reduction}, so its bottleneck would be empty")
    return copied


def insert(model: nn.Module, what: Mapping[str, tuple[Iterable[nn.Module], nn.Module | None]]) -> None:
    """Put adapters and what combines them behind layers of a model, in place."""
    for path, (adapters, combine) in what.items():
        layer = model.get_submodule(path)
        device = next((p.device for p in layer.parameters()), torch.device("cpu"))
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Adapted(layer, adapters, combine).to(device))


def backbone_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under the names they have without adapters; the adapters' own are left out."""
    added, state = adapted_layers(model), eager(model).state_dict()
    for path in added:
        inside = {key: state.pop(key) for key in list(state) if key.startswith(f"{path}.")}
        within = f"{path}.layer."
        state |= {f"{path}.{key.removeprefix(within)}": t for key, t in inside.items() if key.startswith(within)}
    return state


def concatenated(model: nn.Module) -> nn.Module:
    """A copy in which the scaled adapters of each layer are one wide adapter: the same function, exactly.

        W_down = [W_down,1; ...; W_down,N],   W_up = [w_1 (*) W_up,1, ..., w_N (*) W_up,N]
        b_down = [b_down,1; ...; b_down,N],   b_up = sum_n w_n (*) b_up,n

    Only a combination that is a weighted sum (one that has `coefficients`) can be written that way.
    """
    wide = copy.deepcopy(model)
    for path, adapted in adapted_layers(wide).items():
        weights, adapters = adapted.combine.coefficients.detach(), list(adapted.adapters)
        one = Bottleneck(weights.shape[1], sum(a.down.out_features for a in adapters)).to(weights)
        scaled = [(w, a.up) for w, a in zip(weights, adapters, strict=True)]
        with torch.no_grad():
            one.down.weight.copy_(torch.cat([a.down.weight for a in adapters]))
            one.down.bias.copy_(torch.cat([a.down.bias for a in adapters]))
            one.up.weight.copy_(torch.cat([w[:, None] * up.weight for w, up in scaled], dim=1))
            one.up.bias.copy_(torch.stack([w * up.bias for w, up in scaled]).sum(0))
        parent, _, name = path.rpartition(".")
        setattr(wide.get_submodule(parent), name, Adapted(adapted.layer, [one]))
    return wide


class Inserting(Method):
    """Base of methods that train modules put into a frozen copy of the target, and a head.

    The copy shares the target's memory, so the target itself stays bit-identical. Its head, the last linear layer,
    starts as the target's and is trained with the modules.
    """

    family = "weights"

    def build(self, target: nn.Module, run: Run, sample: Batch) -> Mapping[str, tuple[Iterable[nn.Module], Any]]:
        """What goes behind which layer, see :func:`insert`. What is to stay frozen must not require a gradient."""
        raise NotImplementedError

    def groups(self) -> list[dict[str, Any]]:
        """Optimiser groups of everything that learns; :attr:`inserted` and :attr:`head` are there."""
        return [{"params": [*self.inserted.values()]}, {"params": [*self.head.values()]}]

    def __init__(self) -> None:
        super().__init__()
        self.inserted, self.head = nn.ParameterDict(), nn.ParameterDict()
        self._model: tuple[nn.Module, ...] = ()  # in a tuple: the backbone is no state of this method

    def setup(self, run: Run, sample: Batch | None) -> None:
        name = type(self).__name__
        if sample is None or "data" not in run.data:
            raise InputError(f"{name} learns from one labelled data set: pass it as data=...")
        if run.training is not None and run.training.ema is not None:
            raise InputError(f"{name}: ema averages weights of the target that stay as they are: leave it out")
        target = eager(run["target"])
        if adapted_layers(target):
            raise InputError(f"{name}: the target has adapters already: pass the backbone without them")
        path = head_of(target, sample.inputs)
        memory = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in target.parameters()}
        for p in target.get_submodule(path).parameters():
            memory[id(p)] = nn.Parameter(p.detach().clone())
        model = copy.deepcopy(target, memory)
        insert(model, self.build(target, run, sample))
        head = {id(p) for p in model.get_submodule(path).parameters()}
        learned = {n.replace(".", "/"): p for n, p in model.named_parameters() if p.requires_grad}
        self.inserted = nn.ParameterDict({n: p for n, p in learned.items() if id(p) not in head})
        self.head = nn.ParameterDict({n: p for n, p in learned.items() if id(p) in head})
        self._model, self._head = (model,), path
        run.add("adapted", model)

    def losses(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        if batch.labels is None:
            raise InputError(f"{type(self).__name__} learns from labels, and this data has none")
        return {"labels": labels_term(run("adapted", batch).logits, batch)}

    def stage(self, i: int, run: Run) -> Stage:
        return Stage({"data": run.data["data"]}, [Phase("inserted", self.losses, self.groups())], train=("adapted",))

    def learns(self, i: int) -> Iterator[nn.Parameter]:
        # A group that is not moved (a learning rate of 0) is in no phase.
        yield from (p for group in self.groups() for p in group["params"])

    def deploy(self, target: nn.Module) -> nn.Module:
        return copy.deepcopy(self._model[0]).requires_grad_(True)


class BottleneckAdapter(Inserting):
    """Train one adapter per layer, and a head, on a frozen backbone: an entry of the bank.

        out = h + W_up relu(W_down h + b_down) + b_up,    h the layer's output

    The deployed model is the source of :class:`~transfuse.weights.AdapterFusion` and
    :class:`~transfuse.weights.ScaLearn`, and their baseline.

    Args:
        layers: taps of the layers to adapt; behind the feed-forward sublayers, one per block, in the papers.
        reduction: width of the layer by that of the bottleneck, at least 1.

    Raises:
        InputError: an argument is out of its range; the target has no such layer, no linear head, or adapters already.

    Source: Houlsby et al., ICML 2019, arXiv:1902.00751; one per layer as in Pfeiffer et al., EACL 2021.
    """

    card = Card(
        paper="Houlsby et al., ICML 2019",
        arxiv="1902.00751",
        carries="nothing",
        teacher="none",
        data="labelled",
        control=True,
    )
    uses_source = False

    def __init__(self, layers: str | Sequence[str] = "*.mlp", reduction: int = 16):
        super().__init__()
        if reduction < 1:
            raise InputError(f"BottleneckAdapter: reduction is {reduction}, it must be at least 1")
        self.layers, self.reduction = layers, reduction

    def build(self, target: nn.Module, run: Run, sample: Batch) -> Mapping[str, tuple[Iterable[nn.Module], Any]]:
        fresh = adapted_layers(with_adapters(target, self.layers, self.reduction, sample.inputs))
        return {path: (adapted.adapters, None) for path, adapted in fresh.items()}


class Combining(Inserting):
    """Base of methods that combine the frozen adapters of several sources, per layer, on labels of the target.

    Sources are models that :class:`BottleneckAdapter` (or a wide one of ScaLearn) gave, all on the target's backbone.
    """

    scores_source = False

    def combination(self, count: int, dim: int) -> nn.Module:
        """The new module of one layer, for `count` adapters of width `dim`."""
        raise NotImplementedError

    def build(self, target: nn.Module, run: Run, sample: Batch) -> Mapping[str, tuple[Iterable[nn.Module], Any]]:
        name, head = type(self).__name__, head_of(target, sample.inputs)
        if run.shuffled:
            raise InputError(f"{name} reads adapters, not outputs, so there is no shuffled arm: shuffle their labels")
        if not run.sources:
            raise InputError(f"{name} combines adapters: pass source=[model, ...] as BottleneckAdapter gives them")
        if len(run.sources) > MANY:
            run.watch.say("many adapters", f"{len(run.sources)} adapters run for every token: cost grows with each")
        banks = {role: adapters_of(role, run[role], target, head) for role in run.sources}
        self._sources = [role.removeprefix("source.") for role in banks]
        paths = list(next(iter(banks.values())))
        for role, bank in banks.items():
            if list(bank) != paths:
                raise InputError(
                    f"{role!r} has adapters behind {', '.join(bank)}, the first source behind {', '.join(paths)}: "
                    "train all with the same layers"
                )
        self._paths = paths
        made = {}
        for path in paths:
            adapters = [bank[path] for bank in banks.values()]
            dims = [adapter.up.out_features for adapter in adapters]
            if len(set(dims)) > 1:
                raise InputError(f"the adapters behind {path!r} have the widths {dims}: they need one backbone")
            frozen = [copy.deepcopy(adapter).requires_grad_(False) for adapter in adapters]
            made[path] = (frozen, self.combination(len(frozen), dims[0]))
        return made


def adapters_of(role: str, source: nn.Module, target: nn.Module, head: str) -> dict[str, Any]:
    """The adapter behind each layer of a source, after a check that its backbone is the target's, bit for bit.

    Raises:
        InputError: it has no adapters, several per layer, or another backbone; the message names the layer.
    """
    found = adapted_layers(source)
    if not found:
        raise InputError(f"{role!r} has no adapters: pass what BottleneckAdapter gave, not the backbone")
    if several := [path for path, adapted in found.items() if len(adapted.adapters) > 1]:
        raise InputError(f"{role!r} has several adapters behind {several[0]!r}: a source has one per layer")
    theirs = backbone_state(source)
    for name, ours in eager(target).state_dict().items():
        if name.startswith(f"{head}."):
            continue
        other = theirs.get(name)
        if other is None or other.shape != ours.shape or not torch.equal(other.to(ours.device), ours):
            raise InputError(f"{role!r} was trained on another backbone than the target's: {name!r} differs")
    return {path: adapted.adapters[0] for path, adapted in found.items()}


def _widths(model: nn.Module, layers: str | Sequence[str], inputs: Any) -> list[tuple[str, int]]:
    names = [layers] if isinstance(layers, str) else layers
    paths = [path for name in names for path in resolve(eager(model), name)]
    taps = Taps(eager(model), paths)
    try:
        with torch.no_grad(), taps.open() as features:
            call(eager(model), inputs)
    finally:
        taps.remove()
    for path in paths:
        if not isinstance(features[path], Tensor) or features[path].dim() not in (2, 3):
            raise InputError(f"{path!r} gives no features (batch, dim) or (batch, tokens, dim): name another layer")
    return [(path, features[path].shape[-1]) for path in paths]

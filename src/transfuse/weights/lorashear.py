"""LoRAShear: heads and channels fade away while adapters move what they held into those that stay."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core import rng
from transfuse.core.adapters import adapted, factors
from transfuse.core.batch import Batch, line_up
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.labels import labels_term
from transfuse.core.method import Bag, Method
from transfuse.core.mixture import Mixture
from transfuse.core.outputs import eager
from transfuse.core.phases import Batches, Gradients, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Data, Indexed
from transfuse.weights.structures import KINDS, Node, Part, find_structures, shrink, zeroed

KEPT, FADING, GONE, WHOLE = 0, 1, 2, -1
"""What is to become of a group; WHOLE is one of a node that must not be pruned."""
RATIOS = (0.25, 0.5)
"""Shares of a node's groups that are left out to see how much depends on it."""
STALE, PATIENCE = 0.005, 2
"""Recovery ends after so many rounds that improved by less than this share."""
CRITERIA = 5
TINY = 1e-8


class LoRAShear(Method):
    """Take heads and hidden channels out of a model, with training memory of the size of adapters.

        x~_g = (T_p - t - 1) / (T_p - t) * [x + alpha / r * B A]_g      for groups g of the period, t = 0 ... T_p - 1
        x_g  = 0 where <x~_g, x_g> < epsilon ||x_g||^2, else x~_g;      B_g = 0, it has moved into x

    1. Each node (the heads, or channels, of one layer) is pruned on trial; the share `protect` of nodes on which
       perplexity depends most stays whole.
    2. After a warm-up, K groups fade in `periods` periods, K / periods in each: the least salient of those left.
       Adapters on every linear layer learn all the while, so that kept groups absorb what fading ones lose. At the end
       of a period B A moves into the weights of all others.
    3. Recovery, in rounds: adapters learn from sources mixed by how much each has lost, p_s = (1 - floor) *
       degradation_s / sum + floor / S, first from the pre-training sources, then from the instructions. A part ends
       early after two rounds that improve by less than 0.5 %.

    Saliency sums five criteria, each with norm one over all groups of a kind: ||x_g||, ||x_g|| / sqrt(n), cosine + 1 of
    x_g and (B A)_g, |<x_g, (B A)_g>|, and half its square. Heads and channels are ranked apart: a head has hundreds of
    times as many weights. Every node keeps a group.
    Groups that are gone stay zero during recovery, which is the training of the smaller model; what is deployed has
    smaller matrices, see :func:`~transfuse.weights.structures.shrink`. There is no source: the target teaches itself.

    Data: a mapping of sources by name (or one data set); some samples of each are held out to measure degradation.

    Args:
        share: of all groups of a kind that are taken out: K, rounded, in (0, 1).
        protect: gamma, share of nodes that stay whole, in [0, 1).
        rank, alpha: of the adapters; their scale is alpha / rank, alpha is 2 * rank by default.
        warmup, prune: shares of the training's steps; recovery has the rest.
        periods: P.
        epsilon: of the half-space, in [0, 1).
        weights: of the five criteria.
        rounds: of each part of recovery.
        floor: share of the mixture that is spread evenly, in [0, 1].
        instructions: names of the streams that are instruction data.
        held_out: samples of each source that measure, and are not trained on.

    Raises:
        InputError: an argument is out of its range; the target has no structures that are known; more groups should go
            than may; data cannot be read by number; the training is not given in steps, or has a moving average.
        MissingExtraError: PEFT is not installed.

    Source: Chen, Ding, Yadav, Zharkov & Liang, 2023, arXiv:2310.18356. Criteria and shrinking are those of the authors'
    later optimiser (only_train_once); stop rule and mixture are this library's reading of Algorithm 5.
    """

    card = Card(
        paper="Chen et al., 2023",
        arxiv="2310.18356",
        sheet=72,
        carries="weights",
        teacher="none",
        data="unlabelled",
        tasks=("language-model",),
    )
    family = "weights"
    uses_source = False
    keeps = ("target",)

    def __init__(
        self,
        share: float = 0.2,
        protect: float = 0.2,
        rank: int = 8,
        alpha: float | None = None,
        warmup: float = 0.1,
        prune: float = 0.4,
        periods: int = 4,
        epsilon: float = 0.0,
        weights: Sequence[float] = (0.2,) * CRITERIA,
        rounds: int = 5,
        floor: float = 0.2,
        instructions: Sequence[str] = (),
        held_out: int = 32,
    ):
        super().__init__()
        for name, value, fits, wanted in (
            ("share", share, 0 < share < 1, "between 0 and 1"),
            ("protect", protect, 0 <= protect < 1, "at least 0 and below 1"),
            ("rank", rank, rank >= 1, "at least 1"),
            ("alpha", alpha, alpha is None or alpha > 0, "positive"),
            ("warmup", warmup, 0 <= warmup < 1, "at least 0 and below 1"),
            ("prune", prune, 0 < prune <= 1 - warmup + TINY, "above 0, and with warmup at most 1"),
            ("periods", periods, periods >= 1, "at least 1"),
            ("epsilon", epsilon, 0 <= epsilon < 1, "at least 0 and below 1"),
            ("weights", weights, len(weights) == CRITERIA and min(weights) >= 0 < max(weights), "five, not negative"),
            ("rounds", rounds, rounds >= 1, "at least 1"),
            ("floor", floor, 0 <= floor <= 1, "between 0 and 1"),
            ("held_out", held_out, held_out >= 1, "at least 1"),
        ):
            if not fits:
                raise InputError(f"LoRAShear: {name} is {value}, it must be {wanted}")
        self.share, self.protect, self.rank, self.alpha = share, protect, rank, alpha
        self.warmup, self.prune, self.periods, self.epsilon = warmup, prune, periods, epsilon
        self.weights, self.rounds, self.floor = tuple(weights), rounds, floor
        self.instructions, self.held_out = tuple(instructions), held_out
        self.additions = nn.ParameterDict()
        """A and B of every layer, the adapted model's own."""
        self.groups = Bag()
        """What is to become of every group, by node, `(groups,)`."""
        self.found = Bag()
        """`deviation` of perplexity by node, `full` loss of every source, and `history`, its loss before each round."""
        self.register_buffer("at", torch.zeros(3, dtype=torch.long))
        """Part (0 pruning, 1 sources, 2 instructions), rounds done in it, and how many of the last ones were stale."""
        self._lora: tuple[Any, ...] = ()
        self._nodes: tuple[Node, ...] = ()

    def setup(self, run: Run, sample: Batch | None) -> None:
        if sample is None:
            raise InputError("LoRAShear needs data to see what depends on what: pass data={name: samples, ...}")
        if run.training is None or run.training.steps is None:
            raise InputError("LoRAShear: a mixture of sources has no epochs: say steps=...")
        if run.training.ema is not None:
            raise InputError(f"ema is {run.training.ema}: groups that are gone must stay zero: leave it out")
        for name, data in run.data.items():
            if not isinstance(data, Indexed) or data.size <= self.held_out:
                raise InputError(
                    f"LoRAShear holds {self.held_out} samples of {name!r} out: expected a data set with more, read by "
                    "number, or another held_out="
                )
        if unknown := [name for name in self.instructions if name not in run.data]:
            raise InputError(f"there is no stream {unknown[0]!r} for instructions; there are {', '.join(run.data)}")
        if not self._sources(run, 1):
            raise InputError("all data is called instructions: name at least one pre-training source")
        target = eager(run["target"])
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        lora = adapted(target, sample.inputs, self.rank, alpha, purpose="LoRAShear")
        self._lora, self._nodes = (lora,), tuple(find_structures(target))
        learned = {name: p for name, p in lora.model.named_parameters() if p.requires_grad}
        self.additions = nn.ParameterDict({name.replace(".", "/"): p for name, p in learned.items()})
        for node in self._nodes:
            self.groups[_flat(node)] = torch.full((node.count,), KEPT)
        run.add("adapted", lora.model)

    # Stages ----------------------------------------------------------------------------------------------------

    def begin_stage(self, i: int, run: Run) -> bool:
        run.set_modes(set())
        if i == 0:
            self._probe(run)
            return True
        before, now = self.found["history"][-1], self._losses(run, "adapted")
        self.found["history"] = torch.cat([self.found["history"], now[None]])
        part, done, stale = self.at.tolist()
        if part:
            mine = [list(run.data).index(name) for name in self._sources(run, part)]
            gained = 1 - float(now[mine].mean() / before[mine].mean())
            done, stale = done + 1, stale + 1 if gained < STALE else 0
        if not part or done == self.rounds or stale == PATIENCE:
            part, done, stale = part + 1, 0, 0
        self.at.copy_(torch.tensor([part, done, stale]))
        return part <= (2 if self.instructions else 1) and self._steps(run)[2] > 0

    def stage(self, i: int, run: Run) -> Stage:
        part, (warm, fading, recovering) = int(self.at[0]), self._steps(run)
        sources = self._sources(run, max(part, 1))
        pools = {name: _split(run, name, self.held_out)[1] for name in sources}
        shares = torch.full((len(sources),), 1 / len(sources))
        if part:
            mine = [list(run.data).index(name) for name in sources]
            shares = mixture(self.found["history"][-1][mine] - self.found["full"][mine], self.floor)
        steps = max(1, recovering // (self.rounds * (2 if self.instructions else 1))) if part else warm + fading
        phase = Phase("adapters", self._loss, self.additions.values(), edit=self._still)
        stream = Mixture(pools, lambda at: shares.cpu().expand(len(at), -1))
        return Stage({"data": stream}, [phase], steps=steps, train=("adapted",))

    def learns(self, i: int) -> Iterator[nn.Parameter]:
        yield from self.additions.values()

    def _sources(self, run: Run, part: int) -> list[str]:
        return [name for name in run.data if (name in self.instructions) == (part == 2)]

    def _steps(self, run: Run) -> tuple[int, int, int]:
        """Updates of the warm-up, of the periods, which are of equal length, and of recovery."""
        assert run.training is not None and run.training.steps is not None
        total = run.training.steps
        fading = max(1, round(self.prune * total) // self.periods) * self.periods
        warm = round((self.warmup + self.prune) * total) - fading
        return max(0, warm), fading, total - max(0, warm) - fading

    def _loss(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        return {"labels": labels_term(run("adapted", batch).learning, batch)}

    # Knowledge distribution ------------------------------------------------------------------------------------

    def _probe(self, run: Run) -> None:
        """Prune every node on trial; those that matter most stay whole."""
        params = dict(eager(run["target"]).named_parameters())
        full = self._losses(run, "target")
        deviation = []
        for node in self._nodes:
            sizes = node.vectors(params, torch.arange(node.count)).norm(dim=1)
            order, found = sizes.argsort(stable=True).cpu(), []
            for ratio in RATIOS:
                with zeroed(eager(run["target"]), node, order[: max(1, int(ratio * node.count))]):
                    found.append((self._losses(run, "target") - full).exp().mean())
            deviation.append(full.exp().mean() * (torch.stack(found).mean() - 1))
        self.found["full"], self.found["history"] = full, full[None]
        self.found["deviation"] = torch.stack(deviation)
        for n in self.found["deviation"].argsort(descending=True)[: round(self.protect * len(self._nodes))].tolist():
            self.groups[_flat(self._nodes[n])].fill_(WHOLE)
        for kind in KINDS:
            may = sum(n.count - 1 for n in self._nodes if n.kind == kind and self._state(n)[0] != WHOLE)
            if self._wanted(kind) > may:
                raise InputError(
                    f"LoRAShear: {self._wanted(kind)} groups ({kind}) should go, but only {may} may: choose a smaller "
                    "share=, or a smaller protect="
                )

    def _losses(self, run: Run, role: str) -> Tensor:
        """Nats per token of every source on what was held out, `(sources,)`; every process measures the same."""
        found, size = [], run.training.batch_size if run.training else self.held_out
        for name in run.data:
            data, _ = _split(run, name, self.held_out)
            terms = []
            for rows in torch.arange(data.size).split(size):
                batch = line_up(data.fetch(rows), run.task).to(run.device)
                terms.append(labels_term(run(role, batch, grad=False).learning, batch))
            found.append(torch.stack([t.sum.detach() for t in terms]).sum() / sum(float(t.count) for t in terms))
        return torch.stack(found).float()

    # Fading ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        warm, fading, _ = self._steps(run)
        t = run.clock.step - warm
        if self.at[0] or not 0 <= t < fading:
            return
        length = fading // self.periods
        period, t = divmod(t, length)
        if t == 0:
            self._pick(period, run)
        params = dict(eager(run["target"]).named_parameters())
        for node in self._nodes:
            groups = (self._state(node) == FADING).nonzero().flatten().cpu()
            if len(groups):
                self._fade(node, groups, params, (length - t - 1) / (length - t), run)
        if t == length - 1:
            self._merge(params)

    def _pick(self, period: int, run: Run) -> None:
        """Let the least salient of the groups that are left begin to fade."""
        params = dict(eager(run["target"]).named_parameters())
        for kind in KINDS:
            nodes = [node for node in self._nodes if node.kind == kind]
            if not nodes:
                continue
            states = torch.cat([self._state(node) for node in nodes]).cpu()
            importance = self.importance(nodes, params, run).cpu()
            may = states == KEPT
            for mine in torch.arange(len(states)).split([node.count for node in nodes]):
                if may[mine].any():  # the most salient one of every node stays
                    left = mine[may[mine]]
                    may[left[importance[left].argmax()]] = False
            wanted = self._wanted(kind)
            count = wanted * (period + 1) // self.periods - wanted * period // self.periods
            candidates = may.nonzero().flatten()
            chosen = candidates[importance[candidates].argsort(stable=True)[:count]]
            states[chosen] = FADING
            for node, state in zip(nodes, states.split([node.count for node in nodes]), strict=True):
                self._state(node).copy_(state)

    def importance(self, nodes: Sequence[Node], params: Mapping[str, Tensor], run: Run) -> Tensor:
        """The saliency of all groups of some nodes, `(groups,)`."""
        rows = [
            (node.vectors(params, every), self._moved(node, every, params))
            for node in nodes
            for every in [torch.arange(node.count)]
        ]
        return saliency([x for x, _ in rows], [d for _, d in rows], self.weights)

    def _fade(self, node: Node, groups: Tensor, params: Mapping[str, Tensor], factor: float, run: Run) -> None:
        x = node.vectors(params, groups)
        proposed = factor * (x + self._moved(node, groups, params))
        gone = outside(proposed, x, self.epsilon) if factor else torch.ones(len(groups), dtype=torch.bool)
        proposed[gone] = 0.0
        node.write({name: p.data for name, p in params.items()}, groups, proposed)
        for part, factor_of_lora in self._lora_parts(node):
            part.put(factor_of_lora.data, groups, 0.0)
            if len(gone := gone.cpu()) and gone.any():
                for moment in run.optimizers["adapters"].state.get(factor_of_lora, {}).values():
                    if isinstance(moment, Tensor) and moment.shape == factor_of_lora.shape:
                        part.put(moment, groups[gone], 0.0)
        self._state(node)[groups[gone]] = GONE

    def _merge(self, params: Mapping[str, Tensor]) -> None:
        """Move B A of all other groups into the weights, and let B begin anew."""
        for name, p in params.items():
            if (layer := self._layer(name)) is not None:
                b, a, scale = factors(layer)
                p.data.add_((scale * b @ a).to(p.dtype))
                b.data.zero_()

    def _still(self, gradients: Gradients, run: Run) -> None:
        """Nothing moves groups that are gone."""
        for node in self._nodes:
            gone = (self._state(node) == GONE).nonzero().flatten().cpu()
            if len(gone):
                for part, factor in self._lora_parts(node):
                    if factor in gradients:
                        part.put(gradients[factor], gone, 0.0)

    def _moved(self, node: Node, groups: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """alpha / r * (B A)_g of some groups, zero where nothing is added, `(groups, n)`."""
        found = []
        for part in node.parts:
            layer = self._layer(part.name)
            if layer is None:
                found.append(torch.zeros_like(part.take(params[part.name], groups).flatten(1)).float())
                continue
            b, a, scale = factors(layer)
            product = part.take(b, groups) @ a if part.dim == 0 else part.take(a, groups) @ b.T
            found.append(scale * product.flatten(1).float())
        return torch.cat(found, 1)

    def _lora_parts(self, node: Node) -> Iterator[tuple[Part, nn.Parameter]]:
        """Rows of B, and columns of A, by which an adapter reaches the groups of a node."""
        for part in node.parts:
            if (layer := self._layer(part.name)) is not None:
                b, a, _ = factors(layer)
                yield part, b if part.dim == 0 else a

    def _layer(self, name: str) -> nn.Module | None:
        """The adapted layer that a parameter is the weight of."""
        path, _, which = name.rpartition(".")
        layer = self._lora[0].model.get_submodule(path) if which == "weight" else None
        return layer if hasattr(layer, "lora_A") else None

    def _state(self, node: Node) -> Tensor:
        return self.groups[_flat(node)]

    def _wanted(self, kind: str) -> int:
        return round(self.share * sum(node.count for node in self._nodes if node.kind == kind))

    # Afterwards ------------------------------------------------------------------------------------------------

    def deploy(self, target: nn.Module) -> nn.Module:
        merged: nn.Module = copy.deepcopy(self._lora[0]).merge_and_unload()
        for p, own in zip(merged.parameters(), target.parameters(), strict=True):
            p.requires_grad_(own.requires_grad)
        stay = {n.name: (self._state(n) != GONE).nonzero().flatten().cpu() for n in self._nodes}
        return shrink(merged, {name: groups for name, groups in stay.items() if len(groups)})

    def panels(self) -> list[dict[str, Any]]:
        if "deviation" not in self.found:
            return []
        names, history = [node.name for node in self._nodes], self.found["history"]
        left = [float((self._state(node) != GONE).float().mean()) for node in self._nodes]
        deviation = self.found["deviation"].tolist()
        return [
            {
                "kind": "matrix",
                "title": "What was left of every layer",
                "note": "How much perplexity rose with a part of the node left out on trial, and the share that stays.",
                "rows": names,
                "columns": ["deviation", "share kept"],
                "values": [[float(d), s] for d, s in zip(deviation, left, strict=True)],
            },
            {
                "kind": "lines",
                "title": "Loss of every source",
                "note": "On held-out samples: of the full model, after pruning, and after every round of recovery.",
                "x": "round",
                "y": "nats per token",
                "series": {
                    f"source {s}": [(float(i), float(v)) for i, v in enumerate(history[:, s])]
                    for s in range(history.shape[1])
                },
            },
        ]


def saliency(x: Sequence[Tensor], moved: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """How much each group matters, `(groups,)`: five criteria, each with norm one over all groups, weighted.

    Args:
        x, moved: by node, `(groups, n)`: what the groups own, and what the adapters would add to it.
    """
    size = torch.cat([v.norm(dim=1) for v in x])
    average = torch.cat([v.norm(dim=1) / v.shape[1] ** 0.5 for v in x])
    inner = torch.cat([(v * d).sum(1) for v, d in zip(x, moved, strict=True)])
    other = torch.cat([d.norm(dim=1) for d in moved])
    cosine = inner / (size * other).clamp(min=TINY)
    criteria = torch.stack([size, average, cosine + 1, inner.abs(), 0.5 * inner**2])
    normal = criteria / criteria.norm(dim=1, keepdim=True).clamp(min=TINY)
    return normal.new_tensor([float(w) for w in weights]) @ normal


def outside(proposed: Tensor, current: Tensor, epsilon: float) -> Tensor:
    """Which groups have left the half-space of where they were, and are projected to zero, `(groups,)`.

    A group that is zero stays zero.
    """
    norm = (current * current).sum(1)
    return ((proposed * current).sum(1) < epsilon * norm) | (norm == 0)


def mixture(degradation: Tensor, floor: float) -> Tensor:
    """Shares of the sources, `(sources,)`: by how much each has lost, and an even part; even where none has lost."""
    lost = degradation.clamp(min=0).double()
    even = torch.full_like(lost, 1 / len(lost))
    return (1 - floor) * (lost / lost.sum() if lost.sum() > 0 else even) + floor * even


def _split(run: Run, name: str, held_out: int) -> tuple[Indexed, Indexed]:
    """What a source is measured on, and what it is trained on: the same in every process and after a resume."""
    data: Data = run.data[name]
    assert isinstance(data, Indexed)
    draw = torch.Generator().manual_seed(rng.derive(run.seed, "held out", name))
    order = torch.randperm(data.size, generator=draw)
    return data.subset(order[:held_out].sort().values), data.subset(order[held_out:].sort().values)


def _flat(node: Node) -> str:
    return node.name.replace(".", "/")

"""EMoE: a dense transformer is fine-tuned as a mixture of experts that are groups of its own units."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.labels import labels_term
from transfuse.core.method import Method
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.losses.clustering import cosine_logits
from transfuse.weights.experts import balanced_clusters, top_k_gates
from transfuse.weights.layout import Layer, layers_of, transposed

PROJECTED = 256
"""Width in which the learned gate compares, at most."""
LIKE_RANDOM = 1.1
"""Clusters that are less than 10% tighter than those of random rows say that the model is not trained."""


class EMoE(Method):
    """Group the units of perceptrons into experts, and let each token use the best of them while all is fine-tuned.

        experts = balanced k-means of the rows of W_0, each of length one; expert e has f / N of them
        g_e = mean of the rows of W_0 in e,    s = g x + noise / N * N(0, 1) in training
        y = sum over e in the top_k of s of W_1[:, e] act(W_0[e] x + b_0[e]) + b_1

    The chosen experts count with weight 1 and the output's bias once, so with all of them it is the dense network. No
    parameter is added: g follows W_0 after every update and has no gradient. In a gated perceptron the rows are those
    of the gate, and up and down follow it. With adapters (PEFT) g follows the effective weight. The target is the
    trained network; no source takes part. What comes back is a copy whose layers route, or with `dense=True` one that
    does not any more.

    Args:
        experts: N; divides the number of units.
        top_k: experts per token; the authors use a quarter of them, and half with LoRA.
        layers: the numbers of the blocks that route, negative ones from the end; by default the last but one.
        gate: `"average"`, or `"learned"`: cosine with learned centres, and experts count with the softmax of the
            chosen (EMoE-learn).
        clusters: `"similar"`, or `"random"` ones of equal size: the control.
        noise: of the scores in training.
        momentum: how much of the old g stays at an update.
        dense: deploy the network without routing (EMoE2Dense).

    Raises:
        InputError: an argument is out of its range; the target's blocks are not found or a number is none of them; the
            experts do not divide the units.
        MissingExtraError: SciPy is not installed.

    Source: Qiu, Huang & Fu, 2023, arXiv:2310.10908; the authors' code. Capacity is not limited here.
    """

    family = "weights"
    card = Card(
        paper="Qiu et al., 2023",
        arxiv="2310.10908",
        sheet=124,
        carries="weights",
        teacher="none",
        data="labelled",
        tasks=("classification", "language-model", "token-classification"),
    )
    uses_source = False

    def __init__(
        self,
        experts: int = 64,
        top_k: int = 16,
        layers: Sequence[int] = (-2,),
        gate: str = "average",
        clusters: str = "similar",
        noise: float = 1.0,
        momentum: float = 0.0,
        dense: bool = False,
    ):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise InputError(f"EMoE: top_k is {top_k}, it must lie between 1 and experts={experts}")
        for name, value, known in (
            ("gate", gate, ("average", "learned")),
            ("clusters", clusters, ("similar", "random")),
        ):
            if value not in known:
                raise InputError(f"EMoE: {name} is {value!r}, it must be {known[0]!r} or {known[1]!r}")
        if noise < 0 or not 0 <= momentum < 1 or isinstance(layers, int) or not layers:
            raise InputError(
                f"EMoE: noise is {noise}, momentum {momentum}, layers {layers!r}: expected noise of 0 or more, "
                "momentum in [0, 1), and a list of numbers of blocks"
            )
        self.experts, self.top_k, self.layers, self.gate = experts, top_k, layers, gate
        self.clusters, self.noise, self.momentum, self.dense = clusters, noise, momentum, dense
        self.routers = nn.ModuleList()
        self._layers: list[Layer] = []

    def setup(self, run: Run, sample: Batch | None) -> None:
        if run.training is not None and run.training.ema is not None:
            raise InputError("ema averages weights, and gates would not be theirs: leave it out")
        target = run["target"]
        blocks = layers_of(target)
        if wrong := [i for i in self.layers if not -len(blocks) <= i < len(blocks)]:
            raise InputError(f"EMoE: layers names block {wrong[0]}, the target has {len(blocks)}")
        self._layers = [blocks[i] for i in self.layers]
        rows = [effective_weight(target.get_submodule(layer.rise[0])) for layer in self._layers]
        for weight in rows:
            if len(weight) % self.experts:
                raise InputError(
                    f"{len(weight)} units cannot be split into {self.experts} equal experts: use a divisor"
                )
        self.routers = nn.ModuleList(
            Router(weight, self.experts, self.top_k, self.noise, self.gate == "learned") for weight in rows
        )
        run.tap("target", [f"{path}:input" for layer in self._layers for path in (layer.rise[0], layer.down)])
        self.to(run.device)

    def begin_stage(self, i: int, run: Run) -> bool:
        if i:
            return False
        for router, layer in zip(self._routers(), self._layers, strict=True):
            rows = effective_weight(run["target"].get_submodule(layer.rise[0]))
            if self.clusters == "random":
                order = torch.randperm(len(rows), generator=run.shared_rng("experts", layer.down))
                found = (order % self.experts).to(rows.device)
            else:
                found = balanced_clusters(rows, self.experts)
                if _tightness(rows, found) < LIKE_RANDOM * _tightness_of_random(rows, self.experts):
                    run.watch.say(
                        "experts like those of random weights",
                        f"the units of {layer.rise[0]} have no clusters to speak of: is the target trained?",
                    )
            router.assign(found, rows)
        return True

    def stage(self, i: int, run: Run) -> Stage:
        if "data" not in run.data:
            raise InputError("EMoE learns from one data set: pass it as data=...")
        params = [*run["target"].parameters(), *self.parameters()]
        return Stage({"data": run.data["data"]}, [Phase("labels", self.loss, params)])

    def loss(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        if batch.labels is None:
            raise InputError("EMoE needs labels, this data has none")
        return {"labels": labels_term(self.routed(run, batch).learning, batch)}

    def routed(self, run: Run, batch: Batch) -> Outputs:
        """Run the target with its perceptrons routed."""
        swap: dict[str, Any] = {}
        for router, layer in zip(self._routers(), self._layers, strict=True):
            router.train(run["target"].training)
            swap |= {f"{layer.rise[0]}:input": router.read, f"{layer.down}:input": router.weigh}
        return run("target", batch, swap=swap)

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        for router, layer in zip(self._routers(), self._layers, strict=True):
            router.follow(effective_weight(run["target"].get_submodule(layer.rise[0])), self.momentum)

    def deploy(self, target: nn.Module) -> nn.Module:
        found = copy.deepcopy(target)
        for router, layer in zip(() if self.dense else self._routers(), self._layers, strict=False):
            route(found, layer, copy.deepcopy(router).eval())
        return found

    def panels(self) -> list[dict[str, Any]]:
        return [
            {
                "kind": "matrix",
                "title": "Share of the tokens that use each expert",
                "note": f"In the last update; {self.top_k} of {self.experts} are used by each token.",
                "rows": [layer.rise[0] for layer in self._layers],
                "columns": [f"expert {e}" for e in range(self.experts)],
                "values": [router.usage.tolist() for router in self._routers()],
            }
        ]

    def _routers(self) -> Iterator[Router]:
        for router in self.routers:
            assert isinstance(router, Router)
            yield router


class Router(nn.Module):
    """Chooses experts by the perceptron's input, and silences the units of the others.

    Args:
        rows: the weight `(units, width)` whose units are grouped.
        learned: compare with learned centres, and weigh the chosen.
    """

    gate: Tensor
    experts: Tensor
    usage: Tensor

    def __init__(self, rows: Tensor, experts: int, top_k: int, noise: float, learned: bool):
        super().__init__()
        self.top_k, self.noise, self.learned = top_k, noise, learned
        width, count = rows.shape[1], experts
        self.register_buffer("experts", torch.arange(len(rows)) % count)  # whose each unit is
        self.register_buffer("usage", torch.zeros(count))
        if learned:
            narrow = min(width, PROJECTED)
            self.projection = nn.Parameter(torch.randn(narrow, width) / width**0.5)
            self.centres = nn.Parameter(torch.randn(count, narrow))
            self.log_scale = nn.Parameter(torch.tensor(2.0).log())
        else:
            self.register_buffer("gate", torch.zeros(count, width))
        self._weights: Tensor | None = None

    def assign(self, experts: Tensor, rows: Tensor) -> None:
        """Say which expert each unit belongs to."""
        self.experts.copy_(experts)
        self.follow(rows, 0.0)

    @torch.no_grad()
    def follow(self, rows: Tensor, momentum: float) -> None:
        """Make the gate the mean of each expert's rows."""
        if not self.learned:
            count = len(self.gate)
            means = torch.zeros_like(self.gate).index_add(0, self.experts, rows.to(self.gate)) * (count / len(rows))
            self.gate.mul_(momentum).add_(means, alpha=1 - momentum)

    def scores(self, x: Tensor) -> Tensor:
        """`(..., experts)` of inputs `(..., width)`."""
        if self.learned:
            return cosine_logits(x.float() @ self.projection.T, self.centres, self.log_scale.exp())
        return x.detach().to(self.gate.dtype) @ self.gate.T

    def read(self, x: Tensor) -> Tensor:
        """Choose experts by the perceptron's input, which stays as it is."""
        scores = self.scores(x)
        if self.training and self.noise:
            scores = scores + self.noise / scores.shape[-1] * torch.randn_like(scores)
        weights, chosen = top_k_gates(scores, self.top_k)
        each = torch.zeros_like(scores, dtype=torch.float32)
        each = each.scatter(-1, chosen, weights if self.learned else torch.ones_like(weights))
        with torch.no_grad():
            if self.training:
                self.usage.copy_((each > 0).flatten(0, -2).float().mean(0))
        self._weights = each[..., self.experts]
        return x

    def weigh(self, hidden: Tensor) -> Tensor:
        """Silence the units `(..., units)` of experts that were not chosen."""
        assert self._weights is not None
        weights, self._weights = self._weights, None
        return hidden * weights.to(hidden.dtype)


def route(model: nn.Module, layer: Layer, router: Router) -> None:
    """Let a perceptron of a model route, in place: the router becomes a part of its first layer."""
    first, last = model.get_submodule(layer.rise[0]), model.get_submodule(layer.down)
    first.add_module("router", router)
    first.register_forward_pre_hook(_Before(router.read))
    last.register_forward_pre_hook(_Before(router.weigh))


class _Before:
    """A hook that changes a layer's input; an object, so that a copy of the model gets a copy of it."""

    def __init__(self, change: Any):
        self.change = change

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.change(args[0]), *args[1:])


def effective_weight(module: nn.Module) -> Tensor:
    """The weight `(out, in)` that a linear layer has with PEFT's adapters added, without a graph."""
    layer: Any = module
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    weight = base.weight.detach()
    if base is not layer and not layer.merged:
        weight = weight + sum(layer.get_delta_weight(name).detach() for name in layer.active_adapters)
    return weight.T if transposed(base) else weight


def _tightness(rows: Tensor, experts: Tensor) -> float:
    """Mean length of the experts' mean unit vectors: 1 where all rows of an expert point one way."""
    unit = nn.functional.normalize(rows, dim=-1)
    means = [unit[experts == e].mean(0).norm() for e in experts.unique()]
    return float(torch.stack(means).mean())


def _tightness_of_random(rows: Tensor, experts: int) -> float:
    random = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(rows)
    return _tightness(random, balanced_clusters(random, experts))

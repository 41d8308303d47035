"""Learned coefficients of task vectors: what ATLAS and AdaMerging share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from transfuse.core import rng
from transfuse.core.batch import Batch, line_up
from transfuse.core.errors import InputError
from transfuse.core.labels import labels_term
from transfuse.core.outputs import Outputs, find_logits
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Data, Stream
from transfuse.losses import Term, entropy
from transfuse.weights.composed import Composed
from transfuse.weights.task_vectors import TaskVectors, layer


class Scaling(Composed):
    """Base of methods that learn how much of every task vector is added to the base.

        theta^(j) = theta_0^(j) + sum over models i of L_ij tau_i^(j)

    `"target"` is the common base, the sources are what was trained from it. The target runs in eval mode, with the
    base's buffers: coefficients are learned for the running statistics that the result has.

    Attributes:
        coefficients: L, `(chosen models, blocks, groups)`; one block where all share their coefficients.
        chosen: `(chosen models, blocks)`, the number of the model that each coefficient belongs to.
    """

    start: float = 0.0
    """What every coefficient is at first."""
    blockwise: bool = True
    """Whether every block has coefficients of its own."""
    groups: int = 1
    """Random groups of entries, within every block, that have coefficients of their own; `seed` draws them."""
    seed: int = 0
    head: str | None = None
    """A layer that is trained as it is rather than composed, at `head_lr_scale` times the learning rate."""
    head_lr_scale: float = 1.0
    linearised: bool = False
    """Whether the model is replaced by its tangent at the base."""
    keep: str = "last"
    """Which state is deployed, `"last"` or `"best"` on validation data."""
    chosen: Tensor
    norms: Tensor
    _probed: dict[str, Tensor] | None = None

    def choose(self, vectors: TaskVectors, run: Run, sample: Batch | None) -> Tensor:
        """Which models' vectors are used in each block, `(chosen models, blocks)`; by default all."""
        return torch.arange(len(vectors.names))[:, None].repeat(1, len(vectors.blocks))

    def setup(self, run: Run, sample: Batch | None) -> None:
        name = type(self).__name__
        if run.shuffled:
            raise InputError(f"{name} reads the sources' weights, not their outputs, so there is no shuffled arm")
        if not run.data:
            raise InputError(f"{name} learns coefficients from data: pass data=...")
        vectors = TaskVectors(run["target"], {role: run[role] for role in run.sources}, self.head)
        for one, other in vectors.duplicates():
            run.watch.say(
                f"same weights: {one}, {other}",
                f"{one} and {other} have the same weights, so only the sum of their coefficients means anything",
            )
        self.register_buffer("chosen", self.choose(vectors, run, sample))
        self.register_buffer("norms", vectors.norms())
        blocks = len(vectors.blocks) if self.blockwise else 1
        self.coefficients = nn.Parameter(torch.full((len(self.chosen), blocks, self.groups), self.start))
        self._names = vectors.names
        # In a tuple, for they are no part of the method: they follow from the models when a run is resumed.
        self._vectors = ({b: vectors.stack(b, self.chosen[:, j].tolist()) for j, b in enumerate(vectors.blocks)},)

    def scales(self) -> Tensor:
        """The coefficients as they are used, `(chosen models, blocks, groups)`."""
        return self.coefficients.expand(-1, self.chosen.shape[1], -1)

    def offsets(self) -> dict[str, Tensor]:
        """What is added to the base, by block."""
        if self._probed is not None:
            return self._probed
        scales = self.scales()
        return {b: self._offset(scales[:, j], tau) for j, (b, tau) in enumerate(self._vectors[0].items())}

    def compose(self, target: nn.Module) -> dict[str, Tensor]:
        own = dict(target.named_parameters())
        return {block: own[block].detach() + step.to(own[block].dtype) for block, step in self.offsets().items()}

    def thawed(self, target: nn.Module) -> list[nn.Parameter]:
        return [] if self.head is None else list(layer(target, self.head).parameters())

    def run_composed(self, run: Run, batch: Batch, grad: bool = True) -> Outputs:
        if not self.linearised:
            return super().run_composed(run, batch, grad)
        target = run["target"]
        own = {name: p.detach() for name, p in target.named_parameters()}
        head = {name: p for name, p in target.named_parameters() if self.head and name.startswith(self.head + ".")}

        def logits(params: dict[str, Tensor]) -> Tensor:
            return run("target", batch, grad, params={**own, **head, **params}).logits

        steps = {block: step.to(own[block].dtype) for block, step in self.offsets().items()}
        at = {block: own[block] for block in steps}
        return Outputs(_tangent(logits, at, steps))

    def labels_of(self, batches: Batches, run: Run) -> Losses:
        """The sum over the streams of the mean cross-entropy of each."""
        return {
            name: labels_term(self.run_composed(run, told).learning, batch, _unit(number, name, "labelled"))
            for number, (name, batch, told) in enumerate(_told(batches))
        }

    def entropies_of(self, batches: Batches, run: Run) -> Losses:
        """The sum over the streams of the mean entropy of the predictions on each."""
        found = {}
        for number, (name, batch, told) in enumerate(_told(batches)):
            values = entropy(self.run_composed(run, told).logits)
            unit = "sample" if values.dim() == 1 else "token"
            found[name] = Term.of(values, None if values.dim() == 1 else batch.mask, _unit(number, name, unit))
        return found

    def slopes(self, vectors: TaskVectors, run: Run, loss: Callable[[], Losses]) -> Tensor:
        """dLoss/dL_ij at the base, `(models, blocks)`; one task vector exists at a time."""
        self._probed = {b: torch.zeros_like(p.detach()).requires_grad_() for b, p in vectors.base.items()}
        try:
            value = torch.stack([term.weight * term.mean for term in loss().values()]).sum()
            found = torch.autograd.grad(value, list(self._probed.values()), allow_unused=True, materialize_grads=True)
        finally:
            self._probed = None
        rows = [
            [(vectors.difference(i, b) * g.float()).sum() for b, g in zip(vectors.blocks, found, strict=True)]
            for i in range(len(vectors.names))
        ]
        return torch.stack([torch.stack(row) for row in rows])

    def streams(self, run: Run) -> Mapping[str, Stream | Data]:
        """What a stage reads; the first stream defines the epoch."""
        return run.data

    def stage(self, i: int, run: Run) -> Stage:
        groups: list[dict[str, Any]] = [{"params": [self.coefficients]}]
        if self.head is not None:
            groups.append({"params": self.thawed(run["target"]), "lr_scale": self.head_lr_scale})
        return Stage(self.streams(run), [Phase("coefficients", self.loss, groups)], keep=self.keep, train=())

    @torch.no_grad()
    def deploy(self, target: nn.Module) -> nn.Module:
        if not self.linearised:
            return super().deploy(target)
        return Linearised(target, {block: step.clone() for block, step in self.offsets().items()})

    def panels(self) -> list[dict[str, Any]]:
        if not hasattr(self, "_names"):
            return []
        mean = self.scales().detach().mean(-1).cpu()
        whole = torch.zeros(len(self._names), mean.shape[1]).scatter(0, self.chosen.cpu(), mean)
        rows, columns = [role.removeprefix("source.") for role in self._names], list(self._vectors[0])
        facts: dict[str, Any] = {"kind": "matrix", "rows": rows, "columns": columns}
        return [
            {
                **facts,
                "title": "Coefficients of the task vectors",
                "note": "How much of each source is in each block; 1 takes over its whole change.",
                "values": whole.tolist(),
            },
            {
                **facts,
                "title": "Norms of the task vectors",
                "note": "How far each source moved from the base in each block.",
                "values": self.norms.cpu().tolist(),
            },
        ]

    def _offset(self, scale: Tensor, vectors: Tensor) -> Tensor:
        """The weighted sum of one block: `(models, groups)` and `(models, *shape)` to `(*shape)`."""
        if self.groups == 1:
            return torch.tensordot(scale[:, 0], vectors, 1)
        members = partition(tuple(vectors.shape[1:]), self.groups, self.seed).to(vectors.device)
        return (scale[:, members] * vectors).sum(0)


class Linearised(nn.Module):
    """A model in its tangent space at the base: f(x; theta_0) + J(x) step.

    Args:
        model: f with theta_0; it is copied. steps: by parameter name.
    """

    def __init__(self, model: nn.Module, steps: Mapping[str, Tensor]):
        super().__init__()
        self.model = copy.deepcopy(model)
        self._blocks = list(steps)
        for number, step in enumerate(steps.values()):
            self.register_buffer(f"step{number}", step)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        own = dict(self.model.named_parameters())
        at = {block: own[block].detach() for block in self._blocks}
        steps = {b: self.get_buffer(f"step{n}").to(at[b].dtype) for n, b in enumerate(self._blocks)}
        return _tangent(lambda p: find_logits(functional_call(self.model, p, args, kwargs)), at, steps)


def _tangent(f: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor], steps: dict[str, Tensor]) -> Tensor:
    value, slope = cast(tuple[Tensor, Tensor], jvp(f, (at,), (steps,)))
    return value + slope


@lru_cache(maxsize=256)
def partition(shape: tuple[int, ...], groups: int, seed: int) -> Tensor:
    """The group of every entry of a tensor, drawn once for all tensors of one shape. Do not write to it."""
    draw = torch.Generator().manual_seed(rng.derive(seed, "partition", *shape))
    return torch.randint(groups, shape, generator=draw)


def ready(batch: Batch, run: Run) -> Batch:
    """A batch that was read outside the trainer, as losses get it."""
    return line_up(batch, run.task).to(run.device)


def _told(batches: Batches) -> list[tuple[str, Batch, Batch]]:
    """Every stream's batch, and the same saying which stream it is, for models with a head for each."""
    several = len(batches) > 1
    return [
        (name, batch, Batch(batch, task=torch.full((batch.size,), number)) if several else batch)
        for number, (name, batch) in enumerate(batches.items())
    ]


def _unit(number: int, stream: str, unit: str) -> str:
    return unit if number == 0 else f"{stream}/{unit}"

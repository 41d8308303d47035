"""CUBER: a new task may change what earlier ones use, where that helps both. GPM and TRGP are its first regimes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from transfuse.continual.base import Learner
from transfuse.continual.heads import key
from transfuse.continual.subspace import Matrix, SubspaceMemory, input_rows, matrix_layers
from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.labels import labels_term
from transfuse.core.method import Bag
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Gradients, Losses, Phase
from transfuse.core.run import Run
from transfuse.losses import Term

SHIELDED, SCALED, MOVED = 1, 2, 3
"""The regimes of an earlier task in a layer: untouched; read through a scaling; also moved."""
PARTNERS = 2
"""Earlier tasks that may be read through a scaling in one layer."""


class CUBER(Learner):
    """Continual learning with backward transfer: move along earlier tasks' directions where gradients agree.

    For every linear or convolutional layer l, weight W (out, in), and finished task j the method keeps an orthonormal
    basis B_j (in, rank) of the task's inputs and the gradient G_j of its loss at its end; P_j(A) = A B_j B_j^T.
    Before task t, with g the gradient of its loss on one batch, every earlier task j gets a regime in every layer:

        R1 if ||P_j(g)|| <= eps1 ||g||,  else  R3 if <G_j, g> >= eps2 ||G_j|| ||g||,  else  R2

    and at most two tasks stay in R2 and R3, those with the largest ||P_j(g)||. The task is learned with

        W~ = W + sum_{j in R2, R3} (W B_j Q_j B_j^T - W B_j B_j^T),      Q_j = I at first, learned, kept with the task
        loss = CE(labels, target with W~) + strength * sum_l sum_{j in R3} ||P_j(W - W at the task's start)||

    and no update of W has a part in the subspaces of R1 and R2. At every update each j in R3 is tested again on the
    gradient of the task's loss; where it fails it is in R2 for the rest of the task.

    Whatever the optimiser makes of the projected gradient (momentum, weight decay, Adam's scaling), the update itself
    is projected, too. All other parameters and buffers (biases, normalisation) are task-specific: every task is
    deployed with those it ended with, and with its own Q. So the deployed model is `model(inputs, task=i)`. The penalty
    is a norm and not its square: a step of it has the length `lr * strength`, however little has moved. Layers that run
    several times in one pass are known by the inputs of their last run.

    Args:
        eps1, eps2: thresholds of the regimes.
        strength: lambda, at least 0. (The paper does not give it.)
        threshold, threshold_step: task t's basis holds a share `threshold + threshold_step * t` of its energy.
        samples: of a task, for its regimes, basis and gradient.
        every: updates between two tests of the tasks in R3.
        compact: keep G_j B_j (out, rank) instead of G_j: less memory; the cosine is then that within the subspace.
        heads: `"task"` for a head per task, which is not projected; `"shared"` for the target's own, which is.

    Raises:
        InputError: an argument is out of range, or the target has no layer to project.

    Source: Lin, Yang, Fan & Zhang, NeurIPS 2022, arXiv:2211.00789.
    """

    card = Card(
        paper="Lin, Yang, Fan & Zhang, NeurIPS 2022",
        arxiv="2211.00789",
        sheet=39,
        carries="gradients",
        teacher="tasks",
        data="labelled",
    )
    regimes: ClassVar[int] = MOVED
    """The last regime that is used."""

    def __init__(
        self,
        eps1: float = 0.5,
        eps2: float = 0.0,
        strength: float = 2.0,
        threshold: float = 0.97,
        threshold_step: float = 0.003,
        samples: int = 125,
        every: int = 1,
        compact: bool = False,
        heads: str = "task",
    ):
        super().__init__(heads)
        if not 0 < threshold <= 1 or threshold_step < 0:
            raise InputError(f"threshold is {threshold} (in (0, 1]), threshold_step {threshold_step} (at least 0)")
        if strength < 0 or samples < 1 or every < 1:
            raise InputError(f"strength is {strength} (at least 0), samples {samples}, every {every} (at least 1)")
        self.eps1, self.eps2, self.strength = eps1, eps2, strength
        self.threshold, self.threshold_step, self.samples = threshold, threshold_step, samples
        self.every, self.compact = every, compact
        self.memory = SubspaceMemory()
        self.gradients = Bag()
        """G_j: `"<layer>/<task>"` (out, in)."""
        self.scalings = Bag()
        """Q: `"<layer>/<task>/<earlier task>"` (rank, rank)."""
        self.regime = Bag()
        """`"<layer>/<task>"` (2, earlier tasks): as detected, and as it is after demotions."""
        self.start = Bag()
        """`"<layer>"` (out, in): W when the task began."""
        self.kept = Bag()
        """`"<task>/<name>"`: the task-specific tensors of finished tasks."""

    def setup(self, run: Run, sample: Batch | None) -> None:
        layers = [name for name, layer in matrix_layers(run["target"]).items() if layer.weight.requires_grad]
        run.tap("target", [f"{name}:input" for name in layers])
        super().setup(run, sample)
        assert sample is not None
        found = run("target", sample, grad=False).features
        self._layers = [n for n in layers if f"{n}:input" in found and n != self._head]
        if not self._layers:
            raise InputError(f"{type(self).__name__} projects linear and convolutional layers, this target has none")

    # One task -------------------------------------------------------------------------------------------------------

    def begin_task(self, task: int, run: Run) -> None:
        weights = self.matrices(run["target"])
        for layer, weight in weights.items():
            self.start[key(layer)] = weight.detach().clone()
        with self.looking(run):
            gradients = self.gradient(task, run)
        for layer, gradient in gradients.items():
            found = torch.tensor(self.detect(layer, task, gradient), dtype=torch.int8)
            self.regime[key(layer, task)] = found.repeat(2, 1)
            for j in self.those(layer, task, SCALED, MOVED):
                rank = self.memory.basis(layer, j).shape[1]
                self.scalings[key(layer, task, j)] = nn.Parameter(torch.eye(rank).to(gradient))

    def detect(self, layer: str, task: int, gradient: Tensor) -> list[int]:
        """The regime of every earlier task in a layer, from the gradient (out, in) of the new task's loss."""
        sizes = [float(self.memory.project(layer, gradient, [j]).norm()) for j in range(task)]
        partners = sorted(range(task), key=lambda j: -sizes[j])[:PARTNERS]
        found = []
        for j in range(task):
            regime = SHIELDED
            if j in partners and sizes[j] > self.eps1 * float(gradient.norm()):
                regime = MOVED if self.aligned(layer, j, gradient) else SCALED
            found.append(min(regime, self.regimes))
        return found

    def aligned(self, layer: str, j: int, gradient: Tensor) -> bool:
        """Whether a gradient points the way that helps task j, too; without a gradient of its own it does not."""
        kept = self.gradients[key(layer, j)]
        if self.compact:
            gradient = gradient @ self.memory.basis(layer, j)
        size = float(kept.norm())
        return size > 0 and float((kept * gradient).sum()) >= self.eps2 * size * float(gradient.norm())

    def those(self, layer: str, task: int, *regimes: int) -> list[int]:
        """The earlier tasks that are in one of these regimes now; none before they are detected."""
        now = self.regime[key(layer, task)][1].tolist() if key(layer, task) in self.regime else []
        return [j for j, regime in enumerate(now) if regime in regimes]

    def learns(self, i: int) -> Iterator[nn.Parameter]:
        yield from super().learns(i)
        yield from self.scalings.parameters()  # of this task: those of finished ones are no parameters any more

    def weights(self, task: int, run: Run) -> dict[str, Tensor]:
        return self.composed(task, run["target"])

    def composed(self, task: int, target: nn.Module) -> dict[str, Tensor]:
        """W~ of every layer that reads earlier tasks, in the weight's own shape, by the weight's name."""
        found = {}
        for layer, weight in self.matrices(target).items():
            whole = weight
            for j in self.those(layer, task, SCALED, MOVED):
                basis, scaling = self.memory.basis(layer, j), self.scalings[key(layer, task, j)]
                whole = whole + weight @ basis @ (scaling - torch.eye(len(scaling)).to(scaling)) @ basis.T
            if whole is not weight:
                found[f"{layer}.weight"] = whole.view_as(self.layers(target)[layer].weight)
        return found

    def loss(self, task: int, target: Outputs, batch: Batch, run: Run) -> Losses:
        terms = super().loss(task, target, batch, run)
        moved = [
            self.memory.project(layer, weight - self.start[key(layer)], [j]).norm()
            for layer, weight in self.matrices(run["target"]).items()
            for j in self.those(layer, task, MOVED)
        ]
        if moved:
            terms["moved"] = self.strength * Term(torch.stack(moved).sum())
        return terms

    def edit(self, task: int, gradients: Gradients, run: Run) -> None:
        self._before: dict[str, tuple[Tensor, list[int]]] = {}
        for layer, module in self.layers(run["target"]).items():
            parameter = cast(nn.Parameter, module.weight)
            if task == 0 or parameter not in gradients:
                continue
            weight, gradient = parameter.detach().flatten(1), gradients[parameter].flatten(1)
            if run.clock.step % self.every == 0:
                self.demote(layer, task, gradient, weight)
            if shielded := self.those(layer, task, SHIELDED, SCALED):
                gradients[parameter] = (gradient - self.memory.project(layer, gradient, shielded)).view_as(parameter)
                self._before[layer] = weight.clone(), shielded

    def demote(self, layer: str, task: int, gradient: Tensor, weight: Tensor) -> None:
        """Take tasks out of R3 that the gradient of the task's own loss does not help any more."""
        shared = self.those(layer, task, MOVED)
        if not shared or not gradient.isfinite().all():
            return
        for j in shared:  # the penalty's part in the gradient
            moved = self.memory.project(layer, weight - self.start[key(layer)], [j])
            if size := float(moved.norm()):
                gradient = gradient - self.strength * moved / size
        for j in shared:
            if not self.aligned(layer, j, gradient):
                self.regime[key(layer, task)][1, j] = SCALED

    @torch.no_grad()
    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        weights = self.matrices(run["target"])
        for layer, (before, shielded) in self._before.items():
            weights[layer] -= self.memory.project(layer, weights[layer] - before, shielded)

    # What is kept ---------------------------------------------------------------------------------------------------

    def end_task(self, task: int, run: Run) -> None:
        model = run["target"]
        with self.looking(run):
            gradients, grams = self.gradient(task, run), self.grams(task, run)
        for layer, gram in grams.items():
            self.memory.add(layer, task, gram, min(1.0, self.threshold + self.threshold_step * task))
            kept = gradients[layer] @ self.memory.basis(layer, task) if self.compact else gradients[layer]
            self.gradients[key(layer, task)] = kept
            for j in self.those(layer, task, SCALED, MOVED):
                self.scalings[key(layer, task, j)] = self.scalings[key(layer, task, j)].detach()
        matrices = {f"{layer}.weight" for layer in self._layers}
        for name, tensor in (*self.trained(model), *model.named_buffers()):
            if name not in matrices:
                self.kept[key(task, name)] = tensor.detach().clone()

    def gradient(self, task: int, run: Run) -> dict[str, Tensor]:
        """The gradient (out, in) of a task's mean loss on every layer's W, at the weights as they are."""
        parameters = {name: layer.weight for name, layer in self.layers(run["target"]).items()}
        total = {layer: torch.zeros_like(p.flatten(1)) for layer, p in parameters.items()}
        count = 0
        for batch in self.examples(task, run, self.samples):
            loss = labels_term(self.outputs(task, batch, run).logits, batch).sum
            for value, gradient in zip(total.values(), torch.autograd.grad(loss, [*parameters.values()]), strict=True):
                value += gradient.flatten(1)
            count += batch.size
        return {layer: value / count for layer, value in total.items()}

    @torch.no_grad()
    def grams(self, task: int, run: Run) -> dict[str, Tensor]:
        """R R^T, (in, in) in float64, of the inputs R that every layer gets from a task."""
        found: dict[str, Tensor] = {}
        for batch in self.examples(task, run, self.samples):
            features = self.outputs(task, batch, run, grad=False).features
            for name, layer in self.layers(run["target"]).items():
                rows = input_rows(layer, features[f"{name}:input"]).double()
                found[name] = found.get(name, 0) + rows.T @ rows
        return found

    def layers(self, target: nn.Module) -> dict[str, Matrix]:
        """The layers that are projected, by path."""
        found = matrix_layers(target)
        return {name: found[name] for name in self._layers}

    def matrices(self, target: nn.Module) -> dict[str, Tensor]:
        """Their weights as matrices (out, in)."""
        return {name: layer.weight.flatten(1) for name, layer in self.layers(target).items()}

    def own(self, task: int, target: nn.Module) -> dict[str, Tensor]:
        names = [n for n, _ in (*self.trained(target), *target.named_buffers()) if key(task, n) in self.kept]
        return {name: self.kept[key(task, name)] for name in names} | self.composed(task, target)

    def deploy(self, target: nn.Module) -> nn.Module:
        return self.deployed(target)

    def panels(self) -> list[dict[str, Any]]:
        tasks = range(1, self.task_heads.count)
        if not tasks:
            return []
        found = [torch.cat([self.regime[key(layer, t)][0] for layer in self._layers]).tolist() for t in tasks]
        return [
            {
                "kind": "bars",
                "title": "Regimes of earlier tasks",
                "note": "Pairs of a layer and an earlier task, as detected before each task.",
                "rows": ["R1: left alone", "R2: read through a scaling", "R3: moved as well"],
                "groups": [f"task {task}" for task in tasks],
                "values": [[pairs.count(regime) for pairs in found] for regime in (SHIELDED, SCALED, MOVED)],
            }
        ]

"""Methods that learn a few numbers from which the target's parameters are computed, and fold them away at the end."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.errors import InputError
from transfuse.core.method import Method
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run


class Composed(Method):
    """Base of methods whose target runs with parameters that are functions of frozen tensors and learned ones.

    A subclass makes its learned parameters in `setup`, and says what they mean in `compose`. The target itself is
    frozen but for what `thawed` names.
    """

    family = "weights"

    def compose(self, target: nn.Module) -> dict[str, Tensor]:
        """The computed parameters by name; those of the target that are not in it stay as they are."""
        raise NotImplementedError

    def loss(self, batches: Batches, run: Run) -> Losses:
        """The terms of one micro-batch; run the target with `self.run_composed(run, batch)`."""
        raise NotImplementedError

    def thawed(self, target: nn.Module) -> list[nn.Parameter]:
        """Parameters of the target that are trained beside the learned ones, for instance a new head."""
        return []

    def run_composed(self, run: Run, batch: Batch, grad: bool = True) -> Outputs:
        """The target's outputs with the computed parameters; gradients reach them and what is thawed, nothing else."""
        target = run["target"]
        thawed = {id(p) for p in self.thawed(target)}
        own = {name: p if id(p) in thawed else p.detach() for name, p in target.named_parameters()}
        return run("target", batch, grad, params={**own, **self.compose(target)})

    def stage(self, i: int, run: Run) -> Stage:
        if "data" not in run.data:
            raise InputError(f"{type(self).__name__} learns from one data set: pass it as data=...")
        params = [*self.learns(i), *self.thawed(run["target"])]
        return Stage({"data": run.data["data"]}, [Phase("composed", self.loss, params)])

    @torch.no_grad()
    def deploy(self, target: nn.Module) -> nn.Module:
        folded = copy.deepcopy(target)
        own = dict(folded.named_parameters())
        for name, value in self.compose(target).items():
            own[name].copy_(value)
        return folded

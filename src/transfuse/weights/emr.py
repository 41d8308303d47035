"""EMR merging: one set of weights, and for each task a mask and a number."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.method import Method
from transfuse.core.run import Run
from transfuse.weights.checkpoint import InMemory
from transfuse.weights.ledger import reconcile


class EMR(Method):
    """Elect one task vector for all tasks; mask and rescale it for each.

        elect:    sign = sgn(sum_i tau_i);  |tau| = the largest |tau_i| among those that have that sign
        mask:     M_i = [tau_i * tau > 0]
        rescale:  lambda_i = sum |tau_i| / sum |M_i * tau|, over all of the network
        theta_i = base + lambda_i * M_i * tau

    A mask takes a bit per weight. What comes back is a module that is told the task, by its number (the order of the
    sources; held-out data of several sets is told by its set). Nothing is trained and no data is needed.

    Raises:
        InputError: there are no sources, or they are not of one architecture.

    Source: Huang, Ye, Chen, He, Yue & Ouyang, NeurIPS 2024, arXiv:2405.17461.
    """

    card = Card(
        paper="Huang, Ye, Chen, He, Yue & Ouyang, NeurIPS 2024",
        arxiv="2405.17461",
        carries="weights",
        teacher="weights",
        data="none",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )
    family = "weights"
    needs_data = False
    trains = False

    def setup(self, run: Run, sample: Batch | None) -> None:
        if run.shuffled or not run.sources:
            raise InputError("EMR merges the sources, one per task, into the target: pass source=[model, ...]")
        reconcile(InMemory(run["target"], "target"), [InMemory(run[r], r) for r in run.sources], force=True)
        self._models = tuple(run[role] for role in run.sources)  # no part of the method

    def begin_stage(self, i: int, run: Run) -> bool:
        return False  # there is nothing to train

    @torch.no_grad()
    def deploy(self, target: nn.Module) -> MaskedTasks:
        base = dict(target.named_parameters())
        deltas = [
            {k: p - base[k] for k, p in model.named_parameters() if p.is_floating_point()} for model in self._models
        ]
        unified = {key: elected_largest([delta[key] for delta in deltas]) for key in deltas[0]}
        masks = [{key: delta[key] * unified[key] > 0 for key in delta} for delta in deltas]
        scales = [
            sum(float(d.abs().sum()) for d in delta.values())
            / max(sum(float((unified[key].abs() * mask[key]).sum()) for key in delta), 1e-30)
            for delta, mask in zip(deltas, masks, strict=True)
        ]
        return MaskedTasks(copy.deepcopy(target), unified, masks, scales)


class MaskedTasks(nn.Module):
    """A network with a mask and a number for each task.

    Args:
        base: the network without what was learned; what is added to it is kept once, as `tau`.
    """

    def __init__(
        self, base: nn.Module, unified: dict[str, Tensor], masks: list[dict[str, Tensor]], scales: list[float]
    ):
        super().__init__()
        self.base = base
        self.names = list(unified)
        self.tau = nn.ParameterList([nn.Parameter(value, requires_grad=False) for value in unified.values()])
        self.register_buffer("scales", torch.tensor(scales))
        self.scales: Tensor
        for number, mask in enumerate(masks):
            for place, key in enumerate(self.names):
                self.register_buffer(f"mask_{number}_{place}", mask[key])

    def weights(self, task: int) -> dict[str, Tensor]:
        """The parameters of a task by name."""
        own = dict(self.base.named_parameters())
        return {
            key: own[key] + self.scales[task] * self.tau[place] * self.get_buffer(f"mask_{task}_{place}")
            for place, key in enumerate(self.names)
        }

    def forward(self, *args: Any, task: int = 0, **kwargs: Any) -> Any:
        return functional_call(self.base, self.weights(task), args, kwargs)


def elected_largest(deltas: list[Tensor]) -> Tensor:
    """For each entry the largest change that has the sign of their sum; where it is 0, plus."""
    stacked = torch.stack(deltas)
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    return (stacked * sign).clamp(min=0).amax(0) * sign

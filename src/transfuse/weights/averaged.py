"""Merges that weigh models by what they do on data; nothing is trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.errors import InputError
from transfuse.core.method import Bag, Method
from transfuse.core.phases import Batches, Observe, Stage
from transfuse.core.run import Run
from transfuse.weights.checkpoint import InMemory
from transfuse.weights.ledger import reconcile


class Averaged(Method):
    """Base: statistics of every source on its own data decide how much each of its weights counts.

    The sources are models of one architecture, `"target"` is that architecture; data is one stream for all of them, or
    one for each, by their names or in their order.
    """

    family = "weights"
    trains = False
    one_process = "each process would see statistics of its own part of the data"

    def __init__(self) -> None:
        super().__init__()
        self.found = Bag()
        """Sums of statistics by source and tensor, and how many samples of each source were seen."""

    def setup(self, run: Run, sample: Batch | None) -> None:
        name = type(self).__name__
        if run.shuffled or not run.sources:
            raise InputError(f"{name} merges the sources into the target: pass source=[model, ...]")
        if len(run.data) not in (1, len(run.sources)):
            raise InputError(
                f"{name} takes one data set, or one for each of {len(run.sources)} models; found {len(run.data)}"
            )
        reconcile(InMemory(run["target"], "target"), [InMemory(run[r], r) for r in run.sources], force=True)
        self._models = tuple(run[role] for role in run.sources)  # no part of the method

    def stage(self, i: int, run: Run) -> Stage:
        # An epoch of every stream: shorter ones are read again, and what they say is weighed by what was seen.
        return Stage(dict(run.data), [Observe("statistics", self.observe)], epochs=1, train=())

    def observe(self, batches: Batches, run: Run) -> None:
        """Add one micro-batch of every source to the statistics."""
        names = list(batches)
        for number, role in enumerate(run.sources):
            batch = batches[names[number if len(names) > 1 else 0]]
            with torch.enable_grad():
                self.statistics(number, role, batch, run)
            self.add(number, "seen", torch.tensor(batch.size))

    def statistics(self, number: int, role: str, batch: Batch, run: Run) -> None:
        """Add what a source's batch says to `found`."""
        raise NotImplementedError

    def add(self, number: int, key: str, value: Tensor) -> None:
        """Add to a sum."""
        name = f"{number}/{key.replace('.', '/')}"
        before = [self.found[name]] if name in self.found else []
        self.found[name] = sum(before, value.detach())

    def statistic(self, number: int, key: str) -> Tensor | None:
        """The mean over the samples that were seen."""
        name = f"{number}/{key.replace('.', '/')}"
        return self.found[name] / self.found[f"{number}/seen"] if name in self.found else None


def average(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of the floating-point tensors; counters are the first model's."""
    return {
        key: torch.stack([state[key] for state in states]).mean(0) if value.is_floating_point() else value.clone()
        for key, value in states[0].items()
    }


def loaded(target: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with other weights."""
    model = copy.deepcopy(target)
    model.load_state_dict(state)
    return model

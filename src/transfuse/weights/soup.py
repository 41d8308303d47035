"""Greedy soups: models are averaged as long as it helps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.method import Bag, Method
from transfuse.core.phases import Batches, Observe, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Stream
from transfuse.weights.averaged import average, loaded
from transfuse.weights.checkpoint import InMemory
from transfuse.weights.ledger import reconcile


class GreedySoup(Method):
    """Average models one after the other, the best first, and keep each that does not make the average worse.

    Models are ranked by their accuracy on the data, which must not be the test data; one is kept if the accuracy of the
    average with it is at least that without it.

    Raises:
        InputError: there are no sources, or the data has no labels.

    Source: Wortsman et al., ICML 2022, arXiv:2203.05482.
    """

    card = Card(
        paper="Wortsman et al., ICML 2022",
        arxiv="2203.05482",
        carries="weights",
        teacher="weights",
        data="few-labelled",
        tasks=("classification",),
    )
    family = "weights"
    trains = False
    one_process = "each process would rank models by its own part of the data"

    def __init__(self) -> None:
        super().__init__()
        self.state = Bag()
        """How many each model answers rightly, their order, which are kept, and the best so far."""

    def setup(self, run: Run, sample: Batch | None) -> None:
        if run.shuffled or not run.sources:
            raise InputError("GreedySoup averages the sources: pass source=[model, ...]")
        if sample is None or sample.labels is None:
            raise InputError("GreedySoup keeps what helps on labelled data, and this data has no labels")
        reconcile(InMemory(run["target"], "target"), [InMemory(run[r], r) for r in run.sources], force=True)
        self._models = tuple(run[role] for role in run.sources)  # no part of the method
        self.state["right"] = torch.zeros(len(run.sources), dtype=torch.long)
        self.state["kept"] = torch.zeros(len(run.sources), dtype=torch.bool)
        self.state["trial"] = torch.tensor(0)

    def begin_stage(self, i: int, run: Run) -> bool:
        state = self.state
        if i == 1:  # all have been tried alone
            state["order"] = state["right"].argsort(descending=True, stable=True)
            state["kept"][state["order"][0]] = True
            state["best"] = state["right"].max()
        elif i > 1 and state["trial"] >= state["best"]:
            state["kept"][state["order"][i - 1]] = True
            state["best"] = state["trial"]
        state["trial"] = torch.tensor(0)
        return i == 0 or i < len(run.sources)

    def stage(self, i: int, run: Run) -> Stage:
        data = next(iter(run.data.values()))
        return Stage({"data": Stream(data, shuffle=False)}, [Observe("accuracy", self.count)], epochs=1, train=())

    def count(self, batches: Batches, run: Run) -> None:
        """How many of the batch are answered rightly: by each model in the first stage, later by the average with one
        more."""
        batch, number = batches["data"], run.clock.stage
        if number == 0:
            for place, role in enumerate(run.sources):
                self.state["right"][place] += self._right(run(role, batch, grad=False).logits, batch)
            return
        chosen = [*self._kept(), int(self.state["order"][number])]
        params = average([self._models[place].state_dict() for place in chosen])
        self.state["trial"] = self.state["trial"] + self._right(
            run("target", batch, grad=False, params=params).logits, batch
        )

    @torch.no_grad()
    def deploy(self, target: nn.Module) -> nn.Module:
        return loaded(target, average([self._models[place].state_dict() for place in self._kept() or [0]]))

    def _kept(self) -> list[int]:
        return self.state["kept"].nonzero()[:, 0].tolist()

    @staticmethod
    def _right(logits: Tensor, batch: Batch) -> int:
        return int((logits.argmax(-1) == batch.labels).sum())

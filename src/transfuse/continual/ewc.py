"""EWC: parameters that mattered to earlier tasks are held where they were (elastic weight consolidation)."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.continual.base import Learner, pick
from transfuse.continual.heads import key
from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.method import Bag
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.core.run import Run
from transfuse.losses import Term, anchor_penalty


class EWC(Learner):
    """Pull every parameter back to where earlier tasks left it, by how much it mattered to them.

        loss = CE(labels, target) + strength * sum_j 1/2 sum_i F_ji (theta_i - theta*_ji)**2

    theta*_j are the parameters after task j, and F_j is the diagonal of the Fisher information there,

        F_ji = mean over samples x of E_{y ~ p(y|x)} [ (d log p(y|x) / d theta_i)**2 ],

    with y drawn from the model's own answer, not from the labels. With `online` there is one anchor, that of the
    last task, and one running importance, F = decay * F + F_j: memory does not grow with the tasks.

    Args:
        strength: lambda, at least 0.
        samples: samples of a task that estimate its Fisher information.
        online: keep one anchor instead of one per task.
        decay: in (0, 1], share of the earlier importance that stays; only with `online`.
        heads: `"task"` for a head per task, `"shared"` for the target's own head.

    Raises:
        InputError: an argument is out of range.

    Source: Kirkpatrick et al., PNAS 2017, arXiv:1612.00796; online: Schwarz et al., ICML 2018, arXiv:1805.06370.
    """

    card = Card(
        paper="Kirkpatrick et al., PNAS 2017",
        arxiv="1612.00796",
        carries="weights",
        teacher="tasks",
        data="labelled",
    )

    def __init__(
        self,
        strength: float = 100.0,
        samples: int = 200,
        online: bool = False,
        decay: float = 1.0,
        heads: str = "task",
    ):
        super().__init__(heads)
        if strength < 0 or samples < 1 or not 0 < decay <= 1:
            raise InputError(
                f"EWC: strength is {strength} (at least 0), samples {samples} (at least 1), decay {decay} (in (0, 1])"
            )
        self.strength, self.samples, self.online, self.decay = strength, samples, online, decay
        self.anchors = Bag()
        self.importance = Bag()

    def loss(self, task: int, target: Outputs, batch: Batch, run: Run) -> Losses:
        terms = super().loss(task, target, batch, run)
        if task:
            terms["ewc"] = self.strength * Term(self.penalty(task, run))
        return terms

    def penalty(self, task: int, run: Run) -> Tensor:
        """The penalty before it is weighed, a scalar."""
        earlier = [0] if self.online else range(task)
        values = {key(j, n): p for j in earlier for n, p in self.trained(run["target"])}
        anchors, importance = ({name: bag[name] for name in values} for bag in (self.anchors, self.importance))
        return anchor_penalty(values, anchors, importance)

    def end_task(self, task: int, run: Run) -> None:
        with self.looking(run):
            fisher = self.fisher(task, run)
        slot = 0 if self.online else task
        for name, p in self.trained(run["target"]):
            at = key(slot, name)
            before = self.decay * self.importance[at] if at in self.importance else 0
            self.anchors[at] = p.detach().clone()
            self.importance[at] = fisher[name] + before

    def fisher(self, task: int, run: Run) -> dict[str, Tensor]:
        """The diagonal of the Fisher information of a task at the parameters as they are, by name."""
        named = dict(self.trained(run["target"]))
        total = {name: torch.zeros_like(p) for name, p in named.items()}
        count = 0
        for batch in self.examples(task, run, self.samples):
            for row in torch.arange(batch.size, device=run.device).split(1):
                log_p = self.outputs(task, pick(batch, row), run).logits.log_softmax(-1)[0]
                answer = torch.multinomial(log_p.detach().exp(), 1)
                gradients = torch.autograd.grad(log_p[answer].sum(), list(named.values()), allow_unused=True)
                for name, gradient in zip(named, gradients, strict=True):
                    if gradient is not None:
                        total[name] += gradient.pow(2)
                count += 1
        return {name: value / count for name, value in total.items()}

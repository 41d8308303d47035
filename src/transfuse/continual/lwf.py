"""LwF: the model of before a task teaches the earlier tasks on the new samples (learning without forgetting)."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from transfuse.continual.base import Learner
from transfuse.continual.heads import TaskHeads, key
from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.method import Bag
from transfuse.core.outputs import Outputs, modes_kept
from transfuse.core.phases import Losses
from transfuse.core.run import Run
from transfuse.core.taps import PENULTIMATE
from transfuse.losses import Term, soft_cross_entropy


class LwF(Learner):
    """Keep the answers that the earlier tasks' heads gave before this task, on this task's own samples.

        loss = CE(labels, target) + strength * sum_j SoftCE(before_j / T, now_j / T)

    with before_j the logits of task j's head on the new samples by the model as it was when the task began, and
    now_j those at present; body and earlier heads learn, too. No factor T**2, as in the paper. With a shared head
    there is one such term, over all classes of earlier tasks. The old model answers in eval mode.

    The paper's warm-up (the new head alone first), which it finds of no great importance here, is left out.

    Args:
        strength: weight of the old answers, at least 0.
        temperature: T > 0.
        heads: `"task"` for a head per task, `"shared"` for the target's own head.

    Raises:
        InputError: an argument is out of range.

    Source: Li & Hoiem, ECCV 2016, arXiv:1606.09282.
    """

    card = Card(
        paper="Li & Hoiem, ECCV 2016",
        arxiv="1606.09282",
        carries="outputs",
        teacher="tasks",
        data="labelled",
    )

    def __init__(self, strength: float = 1.0, temperature: float = 2.0, heads: str = "task"):
        super().__init__(heads)
        if strength < 0 or temperature <= 0:
            raise InputError(
                f"LwF: strength is {strength} (at least 0), temperature is {temperature} (must be positive)"
            )
        self.strength, self.temperature = strength, temperature
        self.old_body = Bag()
        self.old_heads = TaskHeads()

    def learns(self, i: int) -> Iterator[nn.Parameter]:
        for task in range(i + 1):
            yield from self.task_heads.of(task)

    def begin_task(self, task: int, run: Run) -> None:
        if task:
            model = run["target"]
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                self.old_body[key(name)] = tensor.detach().clone()
            self.old_heads = copy.deepcopy(self.task_heads)

    def loss(self, task: int, target: Outputs, batch: Batch, run: Run) -> Losses:
        terms = super().loss(task, target, batch, run)
        if task:
            pairs = zip(self.answers(task, target), self.old_answers(task, batch, run), strict=True)
            for j, (now, before) in enumerate(pairs):
                old = soft_cross_entropy(now, before, temperature=self.temperature, temperature_squared=False)
                terms[f"lwf.{j}"] = self.strength * Term.of(old)
        return terms

    def answers(self, task: int, target: Outputs) -> list[Tensor]:
        """The logits of every earlier task's head; of all earlier classes at once where the head is shared."""
        if not self.brings_head:
            return [target.logits[:, self._earlier(task)]]
        return [self.task_heads(target.features[PENULTIMATE], j) for j in range(task)]

    @torch.no_grad()
    def old_answers(self, task: int, batch: Batch, run: Run) -> list[Tensor]:
        """The same of the model as it was when the task began."""
        model = run["target"]
        old = {name: self.old_body[key(name)] for name, _ in (*model.named_parameters(), *model.named_buffers())}
        with modes_kept(model):
            model.eval()
            if not self.brings_head:
                return [run("target", batch, False, old).logits[:, self._earlier(task)]]
            features = run("target", batch, False, old, until=PENULTIMATE).features[PENULTIMATE]
        return [self.old_heads(features, j) for j in range(task)]

    def _earlier(self, task: int) -> Tensor:
        return torch.cat([self.task_heads.classes(j) for j in range(task)]).unique()

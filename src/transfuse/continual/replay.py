"""Replay: a few stored samples of earlier tasks are learned along with the new ones (experience replay)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from transfuse.continual.base import Learner, read
from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.method import Bag
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Indexed, Stream
from transfuse.core.taps import PENULTIMATE
from transfuse.losses import IGNORE, Term, cross_entropy


class Replay(Learner):
    """Keep `per_class` samples of every class of every task, and draw from them in every step.

        loss = CE(labels, target) on the batch of the task at hand + CE(labels, target) on stored samples

    An update sees at most `batch` stored samples, through the heads of the tasks they came from: all that are stored
    are gone through in a random order, in equal parts, again and again.

    Args:
        per_class: samples that are kept of each class of a task, chosen at random; all, where there are fewer.
        batch: the most stored samples in an update.
        heads: `"task"` for a head per task, `"shared"` for the target's own head.

    Raises:
        InputError: an argument is below 1, or inputs are no tensors.

    Source: Chaudhry et al., 2019, arXiv:1902.10486.
    """

    card = Card(
        paper="Chaudhry et al., 2019",
        arxiv="1902.10486",
        carries="data",
        teacher="tasks",
        data="labelled",
    )

    def __init__(self, per_class: int = 10, batch: int = 32, heads: str = "task"):
        super().__init__(heads)
        if per_class < 1 or batch < 1:
            raise InputError(f"Replay: per_class is {per_class} and batch is {batch}, both must be at least 1")
        self.per_class, self.batch = per_class, batch
        self.stored = Bag()
        """`"inputs"`, `"labels"` (global) and `"task"` of the samples that are kept."""

    def learns(self, i: int) -> Iterator[nn.Parameter]:
        for task in range(i + 1):
            yield from self.task_heads.of(task)

    def stage(self, i: int, run: Run) -> Stage:
        stage = super().stage(i, run)
        if i == 0:
            return stage
        names = ("inputs", "labels", "task")
        memory = Indexed({name: self.stored[name].cpu() for name in names})
        params = [p for group in stage.trained[0].groups for p in group["params"]]
        streams = {**stage.streams, "memory": Stream(memory, min(self.batch, memory.size))}
        return Stage(streams, [Phase("learn", partial(self._replayed, i), params)])

    def _replayed(self, task: int, batches: Batches, run: Run) -> Losses:
        memory = batches["memory"]
        values = self.values(memory, run("target", memory, until=PENULTIMATE if self.brings_head else None))
        return self._losses(task, batches, run) | {"replay": Term.of(values, unit="memory/sample")}

    def values(self, memory: Batch, target: Outputs) -> Tensor:
        """The cross-entropy of every stored sample, `(batch,)`, by the head of its task."""
        if not self.brings_head:
            return cross_entropy(target.logits, memory.labels)
        found = torch.zeros(memory.size, device=memory.labels.device)
        for task in memory.task.unique().tolist():
            mine = (memory.task == task).nonzero().flatten()
            logits = self.task_heads(target.features[PENULTIMATE][mine], task)
            found = found.index_copy(0, mine, cross_entropy(logits, self.task_heads.rows(memory.labels[mine], task)))
        return found

    def end_task(self, task: int, run: Run) -> None:
        with self.looking(run):
            new = self.choose(task, run)
        for name, value in new.items():
            self.stored[name] = torch.cat([self.stored[name], value]) if name in self.stored else value

    def choose(self, task: int, run: Run) -> dict[str, Tensor]:
        """The samples of a task that are kept."""
        batches = list(read(self.data(task, run)))
        if not all(isinstance(b.inputs, Tensor) for b in batches):
            raise InputError("Replay stores tensors; inputs of several parts it cannot: use EWC, LwF, GPM or CUBER")
        inputs, labels = torch.cat([b.inputs for b in batches]), torch.cat([b.labels for b in batches])
        order = torch.randperm(len(labels), generator=run.shared_rng("replay"))
        order = order[labels[order] != IGNORE]
        kept = torch.cat([order[labels[order] == c][: self.per_class] for c in self.task_heads.classes(task).tolist()])
        found = {"inputs": inputs[kept], "labels": labels[kept], "task": torch.full((len(kept),), task)}
        return {name: value.to(run.device) for name, value in found.items()}

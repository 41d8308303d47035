"""The family of continual learning: tasks come one after the other, and the earlier ones must not be forgotten.

A method of this family is three functions: `begin_task`, `loss` and `end_task`. Stage i of the run trains on the i-th
data set of `data=[...]`, for as long as the caller says: `epochs` and `steps` are those of one task. Labels are global
class ids, in training and in tests; a task's classes are those of its labels, and tasks may share classes.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from transfuse.continual.heads import TaskHeads, TaskModel
from transfuse.core.batch import Batch
from transfuse.core.errors import InputError, MethodError
from transfuse.core.head import head_of, headless
from transfuse.core.labels import labels_term
from transfuse.core.method import Bag, Method
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Gradients, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Data, Draw, Indexed, Iterated
from transfuse.core.taps import PENULTIMATE
from transfuse.losses import IGNORE

HEADS = ("task", "shared")
CHUNK = 256
"""Samples per forward pass outside of phases."""


class Learner(Method):
    """Base of the family.

    The target is any model whose last layer is linear: its head. With `heads="task"` (the task is known when testing)
    every task has a head of its own in that shape, on the features that the target's head would read; the deployed
    model is called `model(inputs, task=i)` and answers with logits over all classes, for tasks that have not come yet
    by a head that has learned nothing. With `heads="shared"` (the task is not known, or the classes stay the same) the
    target's own head serves all tasks, and must have all classes.

    Args:
        heads: `"task"` or `"shared"`.
    """

    family = "continual"
    uses_source = False
    scored_by_stage = True

    def __init__(self, heads: str = "task"):
        super().__init__()
        if heads not in HEADS:
            raise InputError(f"{type(self).__name__}: heads is {heads!r}, it must be one of {', '.join(HEADS)}")
        self.heads = heads
        self.brings_head = heads == "task"
        self.task_heads = TaskHeads()

    # What a method of the family says -------------------------------------------------------------------------------

    def begin_task(self, task: int, run: Run) -> None:
        """Look at the new task before it is learned. May change the method's state."""

    def loss(self, task: int, target: Outputs, batch: Batch, run: Run) -> Losses:
        """The terms of one micro-batch. Labels are rows of the head that gave the target's logits."""
        return {"labels": labels_term(target.logits, batch)}

    def end_task(self, task: int, run: Run) -> None:
        """Remember what must be remembered of a task that has been learned."""

    def weights(self, task: int, run: Run) -> dict[str, Tensor] | None:
        """Tensors to run the target with in the place of its own, by name."""
        return None

    def edit(self, task: int, gradients: Gradients, run: Run) -> None:
        """Change the gradients of an update in place."""

    def own(self, task: int, target: nn.Module) -> dict[str, Tensor]:
        """The tensors that a task keeps for itself when it is deployed, by name."""
        return {}

    def learns(self, i: int) -> Iterator[nn.Parameter]:
        yield from self.task_heads.of(i)

    # What they all share --------------------------------------------------------------------------------------------

    def wants(self) -> dict[str, list[str]]:
        return {"target": [PENULTIMATE]} if self.brings_head else {}

    def setup(self, run: Run, sample: Batch | None) -> None:
        names = list(run.data)
        if sample is None:
            raise InputError(f"{type(self).__name__} learns tasks from labelled data: pass data=[task, task, ...]")
        for own, bag in self.named_children():
            if isinstance(bag, Bag):  # whatever an earlier run has left
                setattr(self, own, type(bag)())
        self._head = head_of(run["target"], sample.inputs) if self.brings_head else ""
        like = self.head_like(run)
        found = [classes_of(name, run.data[name]).to(run.device) for name in names]
        width = run("target", sample, grad=False).logits.shape[1]
        self._total = 1 + max(int(c.max()) for c in found) if self.brings_head else width
        for name, classes in zip(names, found, strict=True):
            if classes[0] < 0 or classes[-1] >= self._total:
                raise InputError(
                    f"task {name!r} has the classes {classes.tolist()}, the target's head has rows for 0 to "
                    f"{width - 1}: give it more, renumber the classes, or use heads='task'"
                )
            self.task_heads.grow(classes, like, run.shared_rng("head", name))

    def head_like(self, run: Run) -> nn.Linear | None:
        """The layer in whose shape every task gets a head; None where tasks have no heads of their own."""
        head = run["target"].get_submodule(self._head) if self.brings_head else None
        return head if isinstance(head, nn.Linear) else None

    def begin_stage(self, i: int, run: Run) -> bool:
        if i == len(run.data):
            return False
        self.begin_task(i, run)
        return True

    def stage(self, i: int, run: Run) -> Stage:
        params = [*(p for _, p in self.trained(run["target"])), *self.learns(i)]
        learn = Phase("learn", partial(self._losses, i), params, edit=partial(self.edit, i))
        return Stage({"data": self.data(i, run)}, [learn])

    def end_stage(self, i: int, run: Run) -> None:
        self.end_task(i, run)

    def deploy(self, target: nn.Module) -> nn.Module:
        if not self.brings_head:
            return target
        return self.deployed(target)

    def deployed(self, target: nn.Module) -> TaskModel:
        """The target as it is now, with everything that the tasks keep for themselves."""
        body = headless(target, self._head) if self.brings_head else copy.deepcopy(target)
        tasks = self.task_heads.count
        own = [self.own(task, target) for task in range(tasks)]
        return TaskModel(body, self.task_heads if self.brings_head else None, own, tasks, self._total)

    def trained(self, target: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """The target's parameters that learn, with their names: all but a head that others stand in for."""
        replaced = {*target.get_submodule(self._head).parameters()} if self.brings_head else set()
        return [(n, p) for n, p in target.named_parameters() if p.requires_grad and p not in replaced]

    def data(self, task: int, run: Run) -> Data:
        """The data of a task."""
        return list(run.data.values())[task]

    def outputs(self, task: int, batch: Batch, run: Run, grad: bool = True) -> Outputs:
        """The target with the head of a task."""
        weights = self.weights(task, run)
        if not self.brings_head:
            return run("target", batch, grad, weights)
        found = run("target", batch, grad, weights, until=PENULTIMATE)
        return Outputs(self.task_heads(found.features[PENULTIMATE], task), found.features)

    def as_rows(self, task: int, batch: Batch) -> Batch:
        """A batch with its labels as rows of the head."""
        if batch.labels is None or not self.brings_head:
            return batch
        return Batch(batch, labels=self.task_heads.rows(batch.labels, task))

    def examples(self, task: int, run: Run, count: int | None = None) -> Iterator[Batch]:
        """Labelled samples of a task, all or `count` drawn at random, in chunks; the same in every process."""
        left = sys.maxsize if count is None else count
        for batch in read(self.data(task, run), None if count is None else run.shared_rng("examples")):
            rows = (batch.labels != IGNORE).nonzero().flatten()[:left]
            left -= len(rows)
            if len(rows):
                yield self.as_rows(task, pick(batch, rows).to(run.device))
            if not left:
                return

    @contextmanager
    def looking(self, run: Run) -> Iterator[None]:
        """Work on the models outside of phases: in eval mode, and without a trace."""
        with run.probe():
            run.set_modes(set())
            yield

    def weighted(self, weight: object) -> NoReturn:
        raise MethodError(f"{type(self).__name__} trains a stream of tasks by itself and cannot be weighed or added")

    __add__ = weighted

    def _losses(self, task: int, batches: Batches, run: Run) -> Losses:
        batch = self.as_rows(task, batches["data"])
        return self.loss(task, self.outputs(task, batch, run), batch, run)


def read(data: Data, order: torch.Generator | None = None) -> Iterator[Batch]:
    """All samples in chunks, in their order or in a random one; where samples have no numbers, as they come."""
    if isinstance(data, Indexed) and order is not None:
        rows = torch.randperm(data.size, generator=order)
        yield from (data.fetch(chunk) for chunk in rows.tensor_split(math.ceil(data.size / CHUNK)))
        return
    for micro in data.epoch(Draw(CHUNK, None, shuffle=False, seed=0), 0):
        yield from micro


def pick(batch: Batch, rows: Tensor) -> Batch:
    """Some samples of a batch."""

    def of(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: of(inner) for name, inner in value.items()}
        return value[rows] if isinstance(value, Tensor) and value.dim() else value

    return Batch(of(batch))


def classes_of(name: str, data: Data) -> Tensor:
    """The classes of a task, ascending, from its labels.

    Raises:
        InputError: it has no labels, can be read only once, or is what a list of tasks was mistaken for.
    """
    if isinstance(data, Iterated) and data.once:
        raise InputError(f"task {name!r} is an iterator, which can be read only once: pass a data set or a DataLoader")
    if name == "data" and isinstance(data, Iterated) and isinstance(data.batches, list):
        raise InputError(
            f"expected a list of tasks, found one data set of {len(data.batches)} batches: a list of (inputs, labels) "
            "is read as batches. Make each task a TensorDataset(inputs, labels), or pass {'first': (inputs, labels)}"
        )
    labels = [batch.labels for batch in read(data)]
    known = torch.cat([found[found != IGNORE] for found in labels if found is not None] or [torch.empty(0)])
    if not len(known):
        raise InputError(f"task {name!r} has no labelled sample, so it cannot be learned: leave it out, or label it")
    return known.long().unique()

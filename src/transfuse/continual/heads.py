"""Output layers of continual learners: a head per task, class prototypes, and the models that are deployed with them.

What a head reads are the target's features: the input of its last linear layer, which stands for its own head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse.core.errors import InputError, ShapeError
from transfuse.core.method import Bag
from transfuse.core.outputs import call, find_logits
from transfuse.losses import IGNORE
from transfuse.losses.clustering import cosine_logits


def key(*parts: object) -> str:
    """A name for a tensor in a :class:`Bag`, where dots are not allowed."""
    return "/".join(str(part).replace(".", "|") for part in parts)


class TaskHeads(Bag):
    """One linear head per task, and the global class ids that its rows stand for.

    Entries: `"<task>/classes"` (rows,), and where there are heads `"<task>/weight"` (rows, width), `"<task>/bias"`.
    """

    @property
    def count(self) -> int:
        """How many tasks are known."""
        return sum(name.endswith("/classes") for name in self._buffers)

    def grow(self, classes: Tensor, like: nn.Linear | None, generator: torch.Generator) -> None:
        """Add a task: its classes, and a head in the shape of another one (None: without a head of its own)."""
        task = self.count
        self[key(task, "classes")] = classes
        if like is not None:
            bound = 1 / math.sqrt(like.in_features)
            draw = torch.rand(len(classes), like.in_features + 1, generator=generator).mul(2 * bound).sub(bound)
            draw = draw.to(like.weight)
            self[key(task, "weight")] = nn.Parameter(draw[:, :-1].clone())
            if like.bias is not None:
                self[key(task, "bias")] = nn.Parameter(draw[:, -1].clone())

    def classes(self, task: int) -> Tensor:
        """The global ids of a task's classes, ascending."""
        return self[key(task, "classes")]

    def of(self, task: int) -> list[nn.Parameter]:
        """The parameters of a task's head."""
        names = (key(task, "weight"), key(task, "bias"))
        return [p for name in names if (p := self._parameters.get(name)) is not None]

    def forward(self, features: Tensor, task: int) -> Tensor:
        """The logits of a task's head, `(batch, rows)`."""
        return F.linear(features, self[key(task, "weight")], self._parameters.get(key(task, "bias")))

    def rows(self, labels: Tensor, task: int) -> Tensor:
        """Global labels as rows of a task's head; what has no label stays without one.

        Raises:
            InputError: a label is none of the task's classes.
        """
        classes = self.classes(task)
        rows = torch.searchsorted(classes, labels.long()).clamp(max=len(classes) - 1)
        known = labels == IGNORE
        if not (known | (classes[rows] == labels)).all():
            raise InputError(
                f"task {task} has the classes {classes.tolist()}, found a label {labels[~known].unique().tolist()}: "
                "a task's labels must not change while it is learned"
            )
        return rows.masked_fill(known, IGNORE)

    def spread(self, logits: Tensor, task: int, total: int) -> Tensor:
        """A head's logits `(batch, rows)` among all classes `(batch, total)`; other tasks' classes are ruled out."""
        return logits.new_full((len(logits), total), -torch.inf).index_copy(1, self.classes(task), logits)


class TaskModel(nn.Module):
    """What is deployed where the task must be known: one body, and for every task its head and its own tensors.

    `forward(inputs, task)` gives logits `(batch, classes)` over all classes of all tasks; those that the task does
    not have are ruled out (-inf).

    Args:
        body: the target; without its head where `heads` are given.
        heads: of all tasks; None where the body's own head serves all.
        own: for each task the parameters and buffers, by name, that take the place of the body's.
        tasks: how many tasks there are.
        total: how many classes there are.
    """

    def __init__(
        self, body: nn.Module, heads: TaskHeads | None, own: Sequence[Mapping[str, Tensor]], tasks: int, total: int
    ):
        super().__init__()
        self.body, self.heads, self.tasks, self.total = body, copy.deepcopy(heads), tasks, total
        self.own = Bag()
        for task, tensors in enumerate(own):
            for name, tensor in tensors.items():
                self.own[key(task, name)] = tensor.detach().clone()

    def forward(self, inputs: Any = None, task: int | None = None, **named: Any) -> Tensor:
        """Logits of one task.

        Raises:
            InputError: the task was not said, or is not one that was learned.
        """
        if task is None or not 0 <= task < self.tasks:
            raise InputError(f"this model knows the tasks 0 to {self.tasks - 1}, found task={task}: say which it is")
        prefix = key(task, "")
        own = {n.removeprefix(prefix).replace("|", "."): t for n, t in self.own.named_buffers() if n.startswith(prefix)}
        found = find_logits(call(self.body, named if inputs is None else inputs, own or None))
        return found if self.heads is None else self.heads.spread(self.heads(found, task), task, self.total)


class Prototypes(Bag):
    """One row per class, the mean of its features; rows are appended as classes come and never move otherwise.

    Kept as sums and counts in float64, divided on reading, so that a class may come back and the order of samples
    does not matter. Entries: `"classes"` (rows,), `"sum"` (rows, width), `"count"` (rows,).
    """

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Take features `(batch, width)` and global labels `(batch,)` into the means.

        Raises:
            ShapeError: the features are of another width than those before.
        """
        if "classes" not in self:
            self["classes"] = labels.new_empty(0)
            self["sum"] = features.new_empty(0, features.shape[1], dtype=torch.float64)
            self["count"] = features.new_empty(0, dtype=torch.float64)
        if features.shape[1] != self["sum"].shape[1]:
            raise ShapeError(
                f"the prototypes have {self['sum'].shape[1]} features, found {features.shape[1]}: use one encoder"
            )
        for label in labels.unique():
            row = (self["classes"] == label).nonzero().flatten()
            if not len(row):
                row = label.new_full((1,), len(self["classes"]))
                for name, new in (("classes", label), ("sum", self["sum"].new_zeros(self["sum"].shape[1]))):
                    self[name] = torch.cat([self[name], new.unsqueeze(0)])
                self["count"] = F.pad(self["count"], (0, 1))
            mine = features[labels == label].double()
            self["sum"][row] += mine.sum(0)
            self["count"][row] += len(mine)

    @property
    def weight(self) -> Tensor:
        """The prototypes, `(rows, width)`, float64."""
        return self["sum"] / self["count"].unsqueeze(1)

    def forward(self, features: Tensor, total: int) -> Tensor:
        """Cosine of features `(batch, width)` with every prototype, among all classes `(batch, total)`.

        Classes without a prototype are ruled out (-inf); before there is any, all are alike.
        """
        if "classes" not in self:
            return features.new_zeros(len(features), total)
        cosines = cosine_logits(features, self.weight.to(features.dtype))
        return cosines.new_full((len(cosines), total), -torch.inf).index_copy(1, self["classes"], cosines)


class PrototypeModel(nn.Module):
    """What is deployed where classes are prototypes: frozen encoders, and the cosine with every class seen.

    Args:
        encoders: models that return features; theirs are put side by side.
        prototypes: of the classes.
        total: how many classes there are, also those not seen yet.
        balance: whether every encoder's features are brought to length 1 first.
    """

    def __init__(self, encoders: Sequence[nn.Module], prototypes: Prototypes, total: int, balance: bool = False):
        super().__init__()
        self.encoders = nn.ModuleList(encoders).requires_grad_(False)
        self.prototypes, self.total, self.balance = copy.deepcopy(prototypes), total, balance

    def forward(self, inputs: Any = None, **named: Any) -> Tensor:
        """Cosines `(batch, total)`; -inf for classes that have not been seen. They are no calibrated logits."""
        branches = [find_logits(call(encoder, named if inputs is None else inputs)) for encoder in self.encoders]
        return self.prototypes(merge(branches, self.balance), self.total)

    @torch.no_grad()
    def predict(self, inputs: Any, classes: Sequence[int] | None = None) -> Tensor:
        """The most similar class of each sample, `(batch,)`, of all seen or only of some.

        Raises:
            InputError: one of the classes has not been seen.
        """
        seen = self.prototypes["classes"]
        wanted = seen if classes is None else torch.as_tensor(classes, device=seen.device)
        if unseen := sorted(set(wanted.tolist()) - set(seen.tolist())):
            raise InputError(f"the classes {unseen} have no prototype yet; seen were {sorted(seen.tolist())}")
        return wanted[self(inputs)[:, wanted].argmax(1)]


def merge(branches: Sequence[Tensor], balance: bool = False) -> Tensor:
    """Features of several encoders side by side, each brought to length 1 if asked."""
    return torch.cat([F.normalize(b, dim=1) if balance else b for b in branches], dim=1)

"""One network, a mask of its weights for every task: batches of one task, masks, their overlap, packed bits."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core import rng
from transfuse.core.errors import InputError, nearest
from transfuse.core.method import Bag
from transfuse.core.mixture import Mixture
from transfuse.core.outputs import call
from transfuse.core.streams import Data, Draw, Indexed


class TaskBatches(Mixture):
    """Several pools, one for the whole of each update: no mask fits a batch of two tasks. `domain` says which.

        p(pool) in proportion to size ** (1 / temperature)

    Args:
        pools: by name.
        temperature: 1 draws by size, infinity all pools alike.
    """

    def __init__(self, pools: Mapping[str, Data], temperature: float = 1.0):
        super().__init__(pools, lambda at: self.probabilities.expand(len(at), -1))
        sizes = torch.tensor([float(pool.size) for pool in self.pools.values()], dtype=torch.float64)
        self.probabilities = (sizes.log() / temperature).softmax(0)

    def _chosen(self, draw: Draw, update: int) -> Tensor:
        generator = torch.Generator().manual_seed(rng.derive(draw.seed, "pool", update))
        pool = torch.multinomial(self.probabilities, 1, generator=generator)
        return pool.expand(draw.batch_size)


def task_pools(name: str, data: Mapping[str, Data]) -> dict[str, Indexed]:
    """The caller's data by task.

    Raises:
        InputError: there is none, or it is not read by number.
    """
    if not data:
        raise InputError(f'{name} learns several tasks: pass data={{"one": ..., "other": ...}}')
    for task, pool in data.items():
        if not isinstance(pool, Indexed):
            raise InputError(f"{name}: {task!r} is read as a {type(pool).__name__}, a data set is needed")
    return {task: pool for task, pool in data.items() if isinstance(pool, Indexed)}


def top_fraction(scores: Tensor, sparsity: float) -> Tensor:
    """1 at the `ceil((1 - sparsity) * size)` largest scores, else 0; of equal ones the first count as larger.

    Its gradient is handed to the scores as it is (straight through).
    """
    found: Tensor = _TopFraction.apply(scores, sparsity)
    return found


class _TopFraction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, sparsity: float) -> Tensor:
        keep = math.ceil(round((1 - sparsity) * scores.numel(), 6))
        order = scores.detach().flatten().sort(descending=True, stable=True).indices
        mask = torch.zeros_like(scores).flatten()
        mask[order[:keep]] = 1
        return mask.view_as(scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def smallest_prefix(counts: Tensor, percent: float) -> Tensor:
    """The fewest entries that together make up a share of the sum, the largest first; boolean, in the shape of counts.

    Of equal ones the first come first.

    Args:
        counts: `(neurons,)`, not negative.
        percent: of the sum, in (0, 100].

    Raises:
        InputError: all are 0.
    """
    total = counts.double().sum()
    if not total > 0:
        raise InputError("no neuron was ever active, so none can be chosen: is the activation a ReLU?")
    values, order = counts.double().sort(descending=True, stable=True)
    enough = values.cumsum(0) * 100 >= percent * total - 1e-9 * total
    chosen = torch.zeros_like(counts, dtype=torch.bool)
    chosen[order[: int(enough.float().argmax()) + 1]] = True
    return chosen


def overlap(masks: Tensor) -> Tensor:
    """Intersection over union of every pair of masks, `(tasks, ...)` boolean to `(tasks, tasks)`."""
    rows = masks.flatten(1).double()
    both = rows @ rows.T
    sizes = rows.sum(1)
    return (both / (sizes[:, None] + sizes - both).clamp(min=1)).float()


def shared(title: str, what: str, tasks: Sequence[str], layers: Sequence[Tensor]) -> dict[str, Any]:
    """A panel of how much tasks share.

    Args:
        what: the masks choose, for its note.
        layers: the masks of every layer, `(tasks, ...)` boolean each.
    """
    return {
        "kind": "matrix",
        "title": title,
        "note": f"Intersection over union of {what}, averaged over layers.",
        "rows": list(tasks),
        "columns": list(tasks),
        "values": torch.stack([overlap(masks) for masks in layers]).mean(0).cpu().tolist(),
    }


def packed(mask: Tensor) -> Tensor:
    """A boolean mask as bits, eight in a byte, `(ceil(size / 8),)`."""
    bits = mask.flatten().to(torch.uint8)
    bits = torch.cat([bits, bits.new_zeros(-len(bits) % 8)]).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1).to(torch.uint8)


def unpacked(bits: Tensor, size: int) -> Tensor:
    """The mask of :func:`packed` again, `(size,)` boolean."""
    return ((bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1).flatten()[:size].bool()


def key(task: int, name: str) -> str:
    """A name in a :class:`Bag` for a task's tensor."""
    return f"{task}/{name.replace('.', '|')}"


class PerTask(nn.Module):
    """A body that runs with other parameters for every task.

    Args:
        body: the network.
        tasks: their names.
    """

    def __init__(self, body: nn.Module, tasks: Sequence[str]):
        super().__init__()
        self.body, self.tasks, self.default = body, list(tasks), 0

    def overrides(self, task: int) -> dict[str, Tensor]:
        """What takes the place of the body's parameters, by name."""
        raise NotImplementedError

    def number(self, task: int | str) -> int:
        """A task's number.

        Raises:
            InputError: there is no such task.
        """
        if isinstance(task, str):
            if task not in self.tasks:
                raise InputError(f"this model has no task {task!r}: {nearest(task, self.tasks)}")
            return self.tasks.index(task)
        if not 0 <= task < len(self.tasks):
            raise InputError(f"this model has the tasks 0 to {len(self.tasks) - 1}, found {task}")
        return task

    def forward(self, inputs: Any = None, task: int | str | None = None, **named: Any) -> Any:
        """The body's answer for a task, by number or name; None is the first that was learned last."""
        number = self.number(self.default if task is None else task)
        return call(self.body, named if inputs is None else inputs, self.overrides(number))

    @torch.no_grad()
    def of(self, task: int | str) -> nn.Module:
        """A plain copy of the body for one task: it masks nothing any more, and costs what the body costs."""
        return with_tensors(self.body, self.overrides(self.number(task)))


class MaskedModel(PerTask):
    """A body with masks over rows of some weights, as bits; what the masks leave is shared by all tasks.

    Args:
        masks: for every task, by the parameter's name, `(rows,)` boolean.
    """

    def __init__(self, body: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]):
        super().__init__(body, list(masks))
        self.bits = Bag()
        for task, found in enumerate(masks.values()):
            for name, mask in found.items():
                self.bits[key(task, name)] = packed(mask)
        self._names = list(next(iter(masks.values())))

    def mask(self, task: int, name: str) -> Tensor:
        """Which rows of a parameter a task has, `(rows,)` boolean."""
        return unpacked(self.bits[key(task, name)], self.body.get_parameter(name).shape[0])

    def overrides(self, task: int) -> dict[str, Tensor]:
        return masked(self.body, {name: self.mask(task, name) for name in self._names})

    @torch.no_grad()
    def union(self, tasks: Sequence[int | str]) -> nn.Module:
        """A plain copy for a task without a mask of its own: it has every row that one of the given ones has."""
        numbers = [self.number(task) for task in tasks]
        found = {name: torch.stack([self.mask(t, name) for t in numbers]).any(0) for name in self._names}
        return with_tensors(self.body, masked(self.body, found))


def masked(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters times their masks over rows, differentiable."""
    found = {}
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        found[name] = weight * mask.to(weight).view(-1, *(1,) * (weight.dim() - 1))
    return found


def with_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with some parameters replaced."""
    plain = copy.deepcopy(model)
    for name, tensor in tensors.items():
        plain.get_parameter(name).data.copy_(tensor)
    return plain

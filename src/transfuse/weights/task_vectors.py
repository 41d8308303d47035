"""Task vectors: what fine-tuning has added to a common base, parameter by parameter.

tau_i^(j) = theta_i^(j) - theta_0^(j) for model i and block j, a block being one parameter tensor of the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError, ShapeError, nearest
from transfuse.weights.checkpoint import Checkpoint, InMemory


class TaskVectors:
    """The task vectors of several models over the blocks of their base. A difference is taken when it is asked for.

    Blocks are the floating-point parameters of the base, tied ones once. Buffers have no task vector: running
    statistics are no direction to add, and counters are integers.

    Args:
        base: what all models were trained from.
        models: by name: modules, or checkpoints that are read one tensor at a time.
        head: path of a layer that is left out, because it answers another question in every model.

    Raises:
        InputError: there is no model; a model lacks a block, or has a number in it that is not finite; the base has no
            such head, or nothing but it.
        ShapeError: a block has another shape than the base's.
    """

    def __init__(self, base: nn.Module, models: Mapping[str, nn.Module | Checkpoint], head: str | None = None):
        if not models:
            raise InputError("task vectors are of models trained from one base: pass them as source=[model, ...]")
        own = {id(p) for p in layer(base, head).parameters()} if head is not None else set()
        self.base = {name: p for name, p in base.named_parameters() if p.is_floating_point() and id(p) not in own}
        """The blocks of the base, by name."""
        if not self.base:
            raise InputError(f"the base has no floating-point parameter{f' outside {head!r}' if head else ''}")
        self.names = tuple(models)
        self._models = [InMemory(m, name) if isinstance(m, nn.Module) else m for name, m in models.items()]
        for model in self._models:
            for block, p in self.base.items():
                _require(model, block, p)

    @property
    def blocks(self) -> list[str]:
        """The names of the blocks, in the base's order."""
        return list(self.base)

    def difference(self, model: int, block: str) -> Tensor:
        """tau of one model and block, float32, where the base is."""
        base, own = self.base[block].detach(), self._models[model]
        return own.read(own.tied.get(block, block)).to(base.device).float() - base.float()

    def stack(self, block: str, models: Sequence[int] | None = None) -> Tensor:
        """tau of some models (by default of all) in one block, `(models, *shape)`."""
        return torch.stack([self.difference(i, block) for i in (range(len(self.names)) if models is None else models)])

    def norms(self) -> Tensor:
        """The norm of every task vector in every block, `(models, blocks)`."""
        return torch.stack(
            [self.stack(block).flatten().view(len(self.names), -1).norm(dim=1) for block in self.blocks], dim=1
        )

    def duplicates(self) -> list[tuple[str, str]]:
        """Pairs of models that are the same in all blocks: one cannot tell which of their coefficients counts."""
        return [
            (self.names[i], self.names[k])
            for i, k in combinations(range(len(self.names)), 2)
            if all(torch.equal(self.difference(i, block), self.difference(k, block)) for block in self.blocks)
        ]


def layer(model: nn.Module, path: str) -> nn.Module:
    """A submodule by its path.

    Raises:
        InputError: there is none; the nearest are named.
    """
    modules = dict(model.named_modules())
    if path not in modules or not path:
        raise InputError(f"{type(model).__name__} has no layer {path!r}: {nearest(path, [m for m in modules if m])}")
    return modules[path]


def _require(model: Checkpoint, block: str, base: Tensor) -> None:
    key = model.tied.get(block, block)
    spec = model.require(key)
    if spec.shape != tuple(base.shape):
        raise ShapeError(
            f"{model.name}: {block!r} is {spec.shape}, the base has {tuple(base.shape)}: task vectors need models of "
            "one architecture; a layer that differs by task can be left out as head=..."
        )
    if not model.read(key).isfinite().all():
        raise InputError(f"{model.name}: {block!r} holds numbers that are not finite: its training has diverged")

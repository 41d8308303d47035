"""How the processes of a run agree: nothing to do for one, flat all-reduces for several.

One all-reduce per phase instead of a wrapper around the model: it carries several optimisers, frozen
phases, gradient rows for solvers and ranks with different amounts of work, which DDP does not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError


class Sync:
    """One process.

    Args:
        device: where models and batches go; by default the first accelerator, else the CPU.
    """

    rank = 0
    world = 1

    def __init__(self, device: str | torch.device | None = None):
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.device = (accelerator or torch.device("cpu")) if device is None else _usable(device)

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of the parameters over the processes."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        return values

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, `(rows, ...)`, in the order of the processes."""
        return rows

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the tensors of the first."""

    def gather_objects(self, value: Any) -> list[Any]:
        """What every process has, in the order of the processes; tensors should be on the CPU."""
        return [value]

    def barrier(self) -> None:
        """Wait for every process."""


class Distributed(Sync):
    """Several processes, started by `accelerate launch` (or `torchrun`)."""

    def __init__(self, device: str | torch.device | None = None):
        from accelerate import PartialState

        asked = device is not None and torch.device(device).type == "cpu"
        # Told neither way, Accelerate would run processes without an accelerator as if each were alone.
        state = PartialState(cpu=asked or not torch.accelerator.is_available())
        super().__init__(state.device)
        self.rank, self.world = state.process_index, state.num_processes

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        groups: dict[torch.dtype, list[nn.Parameter]] = {}
        for p in parameters:
            groups.setdefault(p.dtype, []).append(p)
        for dtype, group in groups.items():
            # A parameter may have a gradient here and none elsewhere; the flags say on which it exists at all.
            flags = torch.tensor([float(p.grad is not None) for p in group], dtype=dtype, device=group[0].device)
            parts = [p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in group]
            flat = self.sum(torch.cat([flags, *parts]))
            values = flat[len(group) :].split([p.numel() for p in group])
            for p, exists, value in zip(group, flat[: len(group)].tolist(), values, strict=True):
                p.grad = value.view_as(p).clone() if exists else None

    def sum(self, values: Tensor) -> Tensor:
        total = values.to(self.device, copy=True)
        torch.distributed.all_reduce(total)
        return total.to(values.device)

    def gather(self, rows: Tensor) -> Tensor:
        counts = torch.zeros(self.world, dtype=torch.int64)
        counts[self.rank] = len(rows)
        counts = self.sum(counts)
        first = int(counts[: self.rank].sum())
        whole = rows.new_zeros(int(counts.sum()), *rows.shape[1:])
        whole[first : first + len(rows)] = rows  # each process fills its part of zeros: the sum holds all of them
        return self.sum(whole)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            whole = tensor.to(self.device).contiguous()  # state that a method keeps on the CPU is sent as well
            torch.distributed.broadcast(whole, src=0)
            tensor.copy_(whole)

    def gather_objects(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        torch.distributed.barrier()


def sync_for(device: str | torch.device | None = None) -> Sync:
    """The right one for this process: several when a launcher says so, else one."""
    return Distributed(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Sync(device)


def _usable(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"the device {str(device)!r} cannot be used here: {error}") from error
    return found

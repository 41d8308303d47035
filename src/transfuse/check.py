"""The dry run behind `transfuse check`: what a transfer would meet, found out before it starts."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.composition import merged_wants
from transfuse.core.outputs import call, eager
from transfuse.core.placement import move
from transfuse.core.taps import Taps
from transfuse.core.teacher import Recorded, gives
from transfuse.core.trainer import Trainer

if TYPE_CHECKING:
    from transfuse.experiment import Transfer

UPDATES = 4
"""Updates of the dry run; the first warms up, the others are timed."""


def check(transfer: Transfer) -> dict[str, Any]:
    """Run one batch through both models and a few updates of every arm on copies; describe what was found."""
    sample = transfer.first_pass()
    transfer._check_data()
    arms = [_dry_run(transfer, number) for number in range(len(transfer.arms))]
    seconds = sum(arm["seconds"] or 0 for arm in arms) * len(transfer.seeds)
    return {
        "task": transfer.task,
        "metric": None if transfer.test is None else transfer.metric,
        "data": {name: _data(data, transfer) for name, data in transfer.data.items()},
        "batch": {name: _shape(value) for name, value in sample.items()},
        "models": _models(transfer, sample),
        "arms": arms,
        "seeds": list(transfer.seeds),
        "estimate": {"seconds": seconds, "memory_mb": max(arm["memory_mb"] for arm in arms)},
        "device": str(transfer.sync.device),
    }


def _data(data: Any, transfer: Transfer) -> dict[str, Any]:
    return {"samples": getattr(data, "size", None), "updates_per_epoch": data.updates(transfer.training.batch_size)}


def _models(transfer: Transfer, sample: Batch) -> dict[str, Any]:
    found: dict[str, Any] = {}
    wants = merged_wants(arm.method for arm in transfer.arms)
    for role, model in (*transfer.sources.items(), ("target", transfer.build_target(transfer.seeds[0]))):
        model = move(model, transfer.sync.device)
        read = sample if role == "target" else sample.for_source()
        names = wants.get(role, [])
        found[role] = {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "gives": sorted(gives(model)),
            "taps": {} if isinstance(model, Recorded) else _taps(model, names, read.to(transfer.sync.device)),
        }
    return found


@torch.no_grad()
def _taps(model: nn.Module, names: list[str], sample: Batch) -> dict[str, Any]:
    """The shapes at the taps, from a copy so that modes and buffers of the user's model stay."""
    model = copy.deepcopy(model).eval()
    taps = Taps(model, names, sample.inputs)
    with taps.open() as features:
        call(eager(model), sample.inputs)
    return {name: _shape(feature) for name, feature in features.items()}


def _dry_run(transfer: Transfer, number: int) -> dict[str, Any]:
    arm = transfer.arms[number]
    trainer = transfer.trainer(arm, transfer.seeds[0], transfer.build_target(transfer.seeds[0], arm.fresh))
    trainer.validate = trainer.score_stage = None
    stamps: list[float] = []
    updates = 0

    def stamp(trainer: Trainer, record: Any) -> None:
        nonlocal updates
        stamps.append(time.perf_counter())
        updates = trainer.clock.steps
        if len(stamps) == UPDATES:
            raise _EnoughError

    trainer.listener = stamp
    kept, began = _Saved(), time.perf_counter()
    with kept, suppress(_EnoughError):
        trainer.fit()
    per_update = 0.0  # of a method that trains nothing
    if stamps:  # a run of a single update has no others to be timed by
        per_update = (stamps[-1] - stamps[0]) / (len(stamps) - 1) if len(stamps) > 1 else stamps[0] - began
    target = trainer.run["target"]
    # Weights, gradients and two moments of the optimiser, the teacher's weights, and what backward keeps.
    weights = sum(p.nbytes for p in target.parameters()) * 4 + sum(p.nbytes for p in trainer.method.parameters()) * 4
    weights += sum(p.nbytes for source in transfer.sources.values() for p in source.parameters())
    return {
        "name": arm.name,
        "role": arm.role,
        "updates": updates,
        "ms_per_update": 1000 * per_update,
        "seconds": updates * per_update,
        "side_parameters": sum(p.numel() for p in trainer.method.parameters()),
        "memory_mb": (weights + kept.bytes) / 1e6,
        "warnings": list(trainer.watch.messages.values()),
    }


class _EnoughError(Exception):
    """Ends a dry run."""


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that one forward pass keeps for backward, at their largest."""

    def __init__(self) -> None:
        self.bytes, self._now = 0, 0
        self._seen: set[int] = set()
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in self._seen:
            self._seen.add(tensor.data_ptr())
            self._now += tensor.nbytes
            self.bytes = max(self.bytes, self._now)
        return tensor

    def _unpack(self, tensor: Tensor) -> Tensor:
        self._seen.clear()
        self._now = 0
        return tensor


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return list(value.shape)
    if isinstance(value, Mapping):
        return {name: _shape(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_shape(v) for v in value]
    return type(value).__name__

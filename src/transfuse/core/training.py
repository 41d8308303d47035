"""What the caller asks of a training: length, batches, optimiser, precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch.optim import Optimizer

from transfuse.core.clock import Constant, Cosine, InverseDecay, Linear, Schedule, Warmup
from transfuse.core.errors import InputError, nearest
from transfuse.core.phases import Groups

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
SCHEDULES = {
    "constant": Constant(),
    "linear": Linear(1.0, 0.0),
    "cosine": Cosine(),
    "inverse": InverseDecay(),
}


@dataclass(frozen=True)
class Training:
    """How long and how a method trains. The same object serves every arm of a comparison.

    Attributes:
        epochs, steps: length; give one of them. A step is one update.
        batch_size: samples per update, over all micro-batches and processes.
        micro_batch: samples per forward pass; None takes the whole share of the process at once. It saves
            memory and does not change the result, except for batch-coupled losses and BatchNorm.
        optimizer: `"adamw"`, `"adam"`, `"sgd"`, or a function from parameter groups to an optimiser.
        lr, weight_decay, momentum: the optimiser's; momentum is SGD's.
        schedule: `"cosine"`, `"linear"`, `"inverse"`, `"constant"`, or a `Schedule`: factor of the learning rate.
        warmup: updates over which the learning rate rises from 0.
        clip: largest norm of a phase's gradient, or of each group's where a phase trains several models; None does
            not clip.
        ema: decay of an exponential moving average of the target's weights, which is then what is validated and
            returned; None for none.
        precision: `"fp32"`, `"bf16"` or `"fp16"`; losses are float32 in each.
        shuffle: whether the order of the data changes every epoch.
        workers: processes that read samples, or train clients; 0 does it in the training process.
        seed: of everything random in the run.
        validate_every: updates between validations; None validates after each epoch.
        checkpoint_every: seconds between checkpoints, where there is a folder to write to.
    """

    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 64
    micro_batch: int | None = None
    optimizer: str | Callable[[Groups], Optimizer] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    momentum: float = 0.9
    schedule: str | Schedule = "cosine"
    warmup: int = 0
    clip: float | None = None
    ema: float | None = None
    precision: str = "fp32"
    shuffle: bool = True
    workers: int = 0
    seed: int = 0
    validate_every: int | None = None
    checkpoint_every: float = 60.0

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise InputError("say how long to train: epochs=... or steps=..., one of them")
        for name in ("epochs", "steps", "batch_size", "micro_batch", "lr", "validate_every"):
            value = getattr(self, name)
            if not isinstance(value, Real | None):
                raise InputError(f"{name} is {value!r}, it must be a number")
            if value is not None and value <= 0:
                raise InputError(f"{name} is {value}, it must be positive")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise InputError(f"ema is {self.ema}, it must be at least 0 and below 1")
        for kind, value, known in (("optimizer", self.optimizer, OPTIMIZERS), ("schedule", self.schedule, SCHEDULES)):
            if isinstance(value, str) and value not in known:
                raise InputError(f"unknown {kind} {value!r}: {nearest(value, known)}")

    def make_optimizer(self, groups: Groups) -> Optimizer:
        """The optimiser for these parameter groups; fused where the device has it."""
        if not isinstance(self.optimizer, str):
            return self.optimizer(groups)
        parameters = [p for group in groups for p in group["params"]]
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
        # torch's fused SGD leaves its momentum unset memory where the first step is skipped for an overflow.
        fused = fused and not (self.optimizer == "sgd" and self.precision == "fp16")
        own = {"momentum": self.momentum} if self.optimizer == "sgd" else {}
        kind = OPTIMIZERS[self.optimizer]
        return kind(groups, lr=self.lr, weight_decay=self.weight_decay, fused=fused, **own)

    def make_schedule(self) -> Schedule:
        """The factor of the learning rate."""
        schedule = SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        return Warmup(self.warmup, schedule) if self.warmup else schedule

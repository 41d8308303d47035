"""The least that every method of the family runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import CNN, Example, images

from transfuse.synthesize import CAEDFKD, RetainAcquire

SMALL: dict[str, Any] = {
    "shape": [1, 4, 4],
    "limits": [-2.0, 2.0],
    "width": 4,
    "latent": 6,
    "generator_steps": 2,
    "student_steps": 2,
}
OPTIONS: dict[str, Any] = {"steps": 6, "batch_size": 16, "optimizer": "sgd", "lr": 0.05}


def teacher(seed: int = 1) -> CNN:
    """A network with running statistics of its own."""
    model = CNN(width=6, norm=True, seed=seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
        model.fc.weight.mul_(4)
    return model


def example(method: CAEDFKD | RetainAcquire) -> Example:
    held_out, labels = images(24)
    known = labels >= 0
    return Example(
        method,
        target=CNN(norm=True, dropout=0.2, seed=2),
        source=teacher(),
        test=(held_out[known], labels[known]),
        options=OPTIONS,
    )


EXAMPLES: dict[str, Callable[[], Example]] = {
    "CAEDFKD": lambda: example(CAEDFKD(**SMALL, life=2, slots=3)),
    "RetainAcquire": lambda: example(RetainAcquire(**SMALL, slots=2, every=1)),
}

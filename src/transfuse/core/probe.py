"""Work on models and leave no trace: what measures, probes and importance scores run in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from transfuse.core import rng
from transfuse.core.outputs import modes_kept


@contextmanager
def no_trace(*models: nn.Module, seed: int) -> Iterator[None]:
    """Put back buffers, modes, gradients, `requires_grad` and the global random numbers when the block ends.

    Parameters are not copied: whoever changes them works on a copy.

    Args:
        seed: of the global generators within the block.
    """
    buffers = [(b, b.clone()) for model in models for b in model.buffers()]
    params = [(p, p.grad, p.requires_grad) for model in models for p in model.parameters()]
    for p, _, _ in params:
        p.grad = None
    try:
        with modes_kept(*models), rng.scope(seed):
            yield
    finally:
        for p, gradient, wanted in params:
            p.grad = gradient
            p.requires_grad_(wanted)
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)

"""Models that were trained from one base, and a run of a method that composes them; shared by tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from helpers import CNN, images
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.run import Run
from transfuse.core.streams import as_data
from transfuse.core.training import Training

INPUTS, LABELS = images(24)


def ready(method: Any, base: nn.Module | None = None, sources: Any = None, data: Any = None, **options: Any) -> Run:
    base = CNN(norm=True) if base is None else base
    sources = [tuned(base, s) for s in (1, 2, 3)] if sources is None else sources
    data = {"data": (INPUTS, LABELS)} if data is None else data
    roles = {"target": base, **{f"source.{i}": m for i, m in enumerate(sources)}}
    run = Run(roles, {n: as_data(d) for n, d in data.items()}, training=Training(steps=1, batch_size=8), **options)
    run.set_modes(set())
    method.setup(run, None)
    return run


def logits(method: Any, run: Run) -> Tensor:
    return method.run_composed(run, Batch(inputs=INPUTS), grad=False).logits


def plain(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(INPUTS)


def put(method: Any, value: Tensor | float) -> None:
    with torch.no_grad():
        method.coefficients.copy_(torch.as_tensor(value))


def total(losses: Any) -> Tensor:
    return sum(t.weight * t.mean for t in losses.values())


def tuned(base: CNN, seed: int) -> CNN:
    """A model that has moved a little from its base."""
    model, draw = CNN(norm=True), torch.Generator().manual_seed(seed)
    model.load_state_dict(base.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=draw)
    return model

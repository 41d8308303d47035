"""Two domains seen through a model, before and after it was adapted: pictures of the report of that family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core import rng
from transfuse.core.batch import Batch
from transfuse.core.outputs import call, eager, modes_kept
from transfuse.core.streams import Data
from transfuse.core.taps import Taps

SAMPLES = 200
"""Of each domain."""


def domain_panels(before: nn.Module, after: nn.Module, domains: dict[str, Data]) -> list[dict[str, Any]]:
    """What enters the head, of samples of each domain, on the two axes along which it varies most.

    The axes are found anew for each model, so compare how the clouds lie to each other, not where.
    Nothing is drawn where one model does not run on both domains.
    """
    samples = {name: data.sample(SAMPLES) for name, data in domains.items()}
    batches = {name: batch for name, batch in samples.items() if batch is not None}
    if len({_shape(batch) for batch in batches.values()}) != 1:
        return []
    note = "Clouds apart are domains that the model tells apart; the head was taught on the source's alone."
    panels = []
    for when, model in (("before", before), ("after", after)):
        features = {name: _penultimate(model, batch) for name, batch in batches.items()}
        plane = _principal(torch.cat(list(features.values())))
        clouds = plane.split([len(f) for f in features.values()])
        series = {name: cloud.tolist() for name, cloud in zip(features, clouds, strict=True)}
        panels.append({"kind": "points", "title": f"domains {when}", "note": note, "series": series})
    return panels


@torch.no_grad()
def _penultimate(model: nn.Module, batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    inputs = batch.to(device).inputs
    with modes_kept(model):
        taps = Taps(model.eval(), ["penultimate"], inputs)
        try:
            with taps.open() as features:
                call(eager(model), inputs)
        finally:
            taps.remove()
    return features["penultimate"].flatten(1).float().cpu()


def _principal(features: Tensor) -> Tensor:
    """The first two principal components, `(samples, 2)`."""
    centred = features - features.mean(0)
    with rng.scope(0):
        _, _, axes = torch.pca_lowrank(centred, q=2)
    return centred @ axes


def _shape(batch: Batch) -> tuple[int, ...]:
    return tuple(batch.inputs.shape[1:]) if isinstance(batch.inputs, Tensor) else ()

"""Multi-SLERP: the mean of several models on a sphere, by one step from their mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.weights.base import Merge, Setting, weights_of
from transfuse.weights.sphere import exponential

SMALLEST = 1e-8


class MultiSLERP(Merge):
    """Average directions on the sphere and lengths apart; with a base, those of what models have learned.

        m = sum_i w_i u_i, scaled to length 1,   u_i the models' directions
        merged = sum_i w_i |theta_i| * exp_m(sum_i w_i (u_i - <u_i, m> m))

    One step in the plane that touches the sphere at m; :class:`Karcher` goes on until it does not move.

    Args:
        weight: of every model, or a list with one for each.
        normalize: divide the weights by their sum.

    Raises:
        InputError: not one finite weight per model, or directions that cancel each other.

    Source: Goddard, 2024 (the method of mergekit).
    """

    card = Card(
        paper="Goddard, mergekit 2024",
        carries="weights",
        teacher="weights",
        data="none",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )

    def __init__(self, weight: Setting = 1.0, normalize: bool = True):
        super().__init__()
        self.weight, self.normalize = weight, normalize

    def merge(self, key: str, base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
        weights = weights_of(self.weight, len(tensors), "MultiSLERP", self.normalize)
        if len(tensors) == 1:
            return tensors[0].clone()
        flats = [(tensor if base is None else torch.sub(tensor, base)).flatten() for tensor in tensors]
        lengths = [float(flat.norm()) for flat in flats]
        mean = torch.zeros_like(flats[0])
        for weight, flat, length in zip(weights, flats, lengths, strict=True):
            mean.add_(flat, alpha=weight / (length + SMALLEST))
        total = float(mean.norm())
        if total < SMALLEST:
            if len(flats) > 2 and any(lengths):
                raise InputError(f"MultiSLERP: the directions of {key!r} cancel each other: give other weights")
            found = sum(weight * flat for weight, flat in zip(weights, flats, strict=True))
        else:
            mean /= total
            tangent = torch.zeros_like(mean)
            for weight, flat, length in zip(weights, flats, lengths, strict=True):
                unit = flat / (length + SMALLEST)
                tangent.add_(unit - (unit @ mean) * mean, alpha=weight)
            found = exponential(mean, tangent) * sum(w * length for w, length in zip(weights, lengths, strict=True))
        assert isinstance(found, Tensor)
        merged = found.view_as(tensors[0])
        return merged if base is None else merged + base

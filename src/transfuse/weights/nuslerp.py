"""NuSLERP: spherical interpolation by weights, of whole tensors or row by row, of models or of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.weights.base import Merge, Setting, weights_of
from transfuse.weights.sphere import interpolated

Along = Literal["tensor", "rows", "columns"]
PARALLEL = 1 - 5e-17
"""Only what is parallel to rounding is interpolated on a line."""


class NuSLERP(Merge):
    """Go along an arc between two models, or between what they have learned where a base is given.

        merged = base + arc(tau_1, tau_2, t),   t = w_2 / (w_1 + w_2)

    Args:
        weight: of both models, or a list with one for each.
        along: what has an angle of its own: the `"tensor"`, each of its `"rows"` (its last dimension), or each of its
            `"columns"` (its first; mergekit's `nuslerp_row_wise`).

    Raises:
        InputError: an argument is out of its range, or there are not exactly two models.

    Source: Goddard, mergekit 2024; Shoemake, SIGGRAPH 1985.
    """

    card = Card(
        paper="Goddard, mergekit 2024",
        carries="weights",
        teacher="weights",
        data="none",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )
    exactly = 2

    def __init__(self, weight: Setting = 1.0, along: Along = "tensor"):
        super().__init__()
        if along not in ("tensor", "rows", "columns"):
            raise InputError(f"NuSLERP: along is {along!r}, it must be 'tensor', 'rows' or 'columns'")
        self.weight, self.along = weight, along

    def merge(self, key: str, base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
        weights = weights_of(self.weight, 2, "NuSLERP", normalize=False)
        t = 0.5 if abs(sum(weights)) < 1e-6 else weights[1] / sum(weights)
        ends = list(tensors) if base is None else [torch.sub(tensor, base) for tensor in tensors]
        if self.along == "tensor" or not ends[0].dim():
            found = interpolated(ends[0].reshape(1, -1), ends[1].reshape(1, -1), t, PARALLEL).view_as(ends[0])
        else:
            dim = -1 if self.along == "rows" else 0
            first, second = (end.movedim(dim, -1) for end in ends)
            found = interpolated(first, second, t, PARALLEL).movedim(-1, dim)
        return found if base is None else found + base

"""Spherical interpolation between two models."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from transfuse.core.card import Card
from transfuse.weights.base import Merge, Setting
from transfuse.weights.sphere import interpolated

PARALLEL = 0.9995
"""Cosine beyond which a line is as good as an arc."""


class SLERP(Merge):
    """Go from one model to another along an arc, tensor by tensor, so that weights do not shrink on the way.

        merged = sin((1 - t) a) / sin(a) * theta_1 + sin(t a) / sin(a) * theta_2,   a the angle between them

    Nearly parallel tensors are interpolated on a line.

    Args:
        t: 0 is the first model, 1 the second. By depth and by name, for instance
            `{"*.self_attn.*": {"depth": [0, 0.5, 1]}, "*": 0.5}`.

    Raises:
        InputError: there are not exactly two models.

    Source: Shoemake, SIGGRAPH 1985.
    """

    card = Card(
        paper="Shoemake, SIGGRAPH 1985",
        carries="weights",
        teacher="weights",
        data="none",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )
    exactly = 2

    def __init__(self, t: Setting = 0.5):
        super().__init__()
        self.t = t

    def merge(self, key: str, base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
        first, second = (tensor.reshape(1, -1) for tensor in tensors)
        return interpolated(first, second, self.t, PARALLEL).view_as(tensors[0])

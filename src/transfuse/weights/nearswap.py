"""NearSwap: take the other model where it is near."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.weights.base import Merge, Setting


class NearSwap(Merge):
    """Move the base towards another model, entry by entry, by at most `t`: near entries are swapped, far ones nudged.

        merged = base + w * (theta - base),   w = min(1, t / |theta - base|)

    Args:
        t: how far an entry moves at most, positive.

    Raises:
        InputError: t is not positive, there is no base, or not exactly one other model.

    Source: alchemonaut, 2024, the model card of QuartetAnemoi-70B.
    """

    card = Card(
        paper="alchemonaut, QuartetAnemoi-70B, 2024",
        carries="weights",
        teacher="weights",
        data="none",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )
    needs_base = True
    elementwise = True
    exactly = 1

    def __init__(self, t: Setting):
        super().__init__()
        if isinstance(t, int | float) and not t > 0:
            raise InputError(f"NearSwap: t is {t}, it must be positive")
        self.t = t

    def merge(self, key: str, base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
        assert base is not None
        return torch.sub(tensors[0], base).clamp_(-self.t, self.t).add_(base)

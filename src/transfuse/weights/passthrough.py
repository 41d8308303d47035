"""Passthrough: one model's weights as they are, for stacking layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from transfuse.core.card import Card
from transfuse.weights.base import Merge, Setting


class Passthrough(Merge):
    """Take one model's tensors, scaled or as they are; with ranges of layers it stacks models.

        merged = scale * theta

    Args:
        scale: for instance `{"*.o_proj.*": 0.0, "*": 1.0}`, which makes copied layers do nothing at first.

    Raises:
        InputError: not exactly one model.

    Source: Kim et al. (depth up-scaling), NAACL 2024, arXiv:2312.15166.
    """

    card = Card(
        paper="Kim et al., NAACL 2024",
        arxiv="2312.15166",
        carries="weights",
        teacher="weights",
        data="none",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )
    elementwise = True
    exactly = 1

    def __init__(self, scale: Setting = 1.0):
        super().__init__()
        self.scale = scale

    def merge(self, key: str, base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0] * self.scale

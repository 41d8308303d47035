"""Weighted average of checkpoints (model soup)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from transfuse.core.card import Card
from transfuse.weights.base import Merge, Setting, weights_of


class Linear(Merge):
    """Average the weights of models that were trained from the same start.

        merged = sum over models i of w_i * theta_i

    Args:
        weight: of every model, or a list with one for each.
        normalize: divide the weights by their sum, so that they sum to one. Off, they count as they are.

    Raises:
        InputError: not one finite weight per model, or weights that sum to 0 are to be normalised.

    Source: Wortsman et al., ICML 2022, arXiv:2203.05482.
    """

    card = Card(
        paper="Wortsman et al., ICML 2022",
        arxiv="2203.05482",
        carries="weights",
        teacher="weights",
        data="none",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )

    elementwise = True

    def __init__(self, weight: Setting = 1.0, normalize: bool = True):
        super().__init__()
        self.weight, self.normalize = weight, normalize

    def merge(self, key: str, base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
        first, *others = weights_of(self.weight, len(tensors), "Linear", self.normalize)
        merged = tensors[0] * first
        for weight, tensor in zip(others, tensors[1:], strict=True):
            merged.add_(tensor, alpha=weight)
        return merged

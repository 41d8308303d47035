"""Static logit fusion (proxy-tuning): a large model moved by what a small one has learned, as far at every token."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.infer.base import Fusion, Moves


class StaticFusion(Fusion):
    """Add what small experts have learned to a large model's logits, with the same weight at every token.

        fused = large + sum over experts t of alpha_t * (expert_t - base)

    With alpha 1 and one expert that is proxy-tuning, a product of experts: P_large * P_expert / P_base. With alpha 0 it
    is the large model as it is, the natural thing to compare with. All models read the same tokens by the same ids.

    Args:
        alpha: of every expert, or a list with one for each, in their order; negative ones move away from an expert.

    Raises:
        InputError: `alpha` is not finite, or not one for each expert.
        VocabularyError: (at the first text) the models mean different tokens.

    Source: Liu et al., COLM 2024, arXiv:2401.08565.
    """

    card = Card(
        paper="Liu et al., COLM 2024",
        arxiv="2401.08565",
        carries="outputs",
        teacher="full",
        data="none",
        tasks=("language-model",),
    )

    def __init__(self, alpha: float | Sequence[float] = 1.0):
        super().__init__()
        if not all(math.isfinite(a) for a in ((alpha,) if isinstance(alpha, int | float) else alpha)):
            raise InputError(f"StaticFusion: alpha is {alpha}, expected finite numbers")
        self.alpha = alpha

    def weights(self, moves: Moves) -> Tensor:
        rows, experts, _ = moves.shifts.shape
        alpha = moves.log_p.new_tensor(self.alpha).expand(-1 if isinstance(self.alpha, Sequence) else experts)
        if len(alpha) != experts:
            raise InputError(f"StaticFusion: alpha has {len(alpha)} numbers, there are {experts} experts")
        return alpha.expand(rows, -1)

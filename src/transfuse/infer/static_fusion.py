"""Static fusion: a large model is moved as far as a small one moved when it was tuned."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.infer.base import Fusion


class StaticFusion(Fusion):
    """Add to a large model's logits what tuning changed in a small one, at every step by the same factor.

        logits = large + alpha * sum_t (expert_t - base)

    With alpha 1 and one expert this is proxy tuning. Nothing is trained, and no weights but the small ones are needed.

    Args:
        alpha: 0 is the large model as it is.

    Raises:
        InputError: fewer than two sources, or alpha is negative.
        VocabularyError: the models mean different tokens.

    Source: Liu, Han, Wang, Tsvetkov, Choi & Smith, COLM 2024, arXiv:2401.08565.
    """

    card = Card(
        paper="Liu, Han, Wang, Tsvetkov, Choi & Smith, COLM 2024",
        arxiv="2401.08565",
        carries="outputs",
        teacher="full",
        data="none",
        tasks=("language-model",),
    )

    def __init__(self, alpha: float = 1.0):
        super().__init__()
        if alpha < 0:
            raise InputError(f"StaticFusion: alpha is {alpha}, it must not be negative")
        self.alpha = alpha

    def fuse(self, large: Tensor, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        for expert in experts:
            large = large + self.alpha * (expert.log_softmax(-1) - base.log_softmax(-1))
        return large

"""Task arithmetic: models as their common ancestor plus sums of what they have learned."""

from __future__ import annotations

from transfuse.core.card import Card
from transfuse.weights.base import Setting
from transfuse.weights.deltas import Thinned


class TaskArithmetic(Thinned):
    """Add what models have learned to their common ancestor; a negative weight takes it away.

        merged = base + scale * sum_i w_i (theta_i - base)

    Args:
        weight: of every model, or a list with one for each.
        scale: of the sum. The paper chooses it on validation data; 0.3 to 0.4 is usual for several models.
        normalize: divide by the sum of the weights; then it is the average.

    Raises:
        InputError: not one finite weight per model, or there is no base.

    Source: Ilharco et al., ICLR 2023, arXiv:2212.04089.
    """

    card = Card(
        paper="Ilharco et al., ICLR 2023",
        arxiv="2212.04089",
        carries="weights",
        teacher="weights",
        data="none",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )
    elementwise = True
    consensus = False

    def __init__(self, weight: Setting = 1.0, scale: Setting = 1.0, normalize: bool = False):
        super().__init__()
        self.weight, self.scale, self.normalize = weight, scale, normalize

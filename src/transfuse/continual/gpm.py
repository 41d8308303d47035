"""GPM: gradients lose their part in the input subspaces of earlier tasks (gradient projection memory)."""

from __future__ import annotations

from transfuse.continual.cuber import CUBER, SHIELDED
from transfuse.core.card import Card


class GPM(CUBER):
    """Gradient projection memory: CUBER with its first regime alone.

        g <- g - P(g),   P onto the sum of all earlier tasks' input subspaces

    The mechanism, in one piece of code, and the notation are :class:`CUBER`'s.

    Args:
        threshold, threshold_step, samples, heads: as in :class:`CUBER`.

    Source: Saha, Garg & Roy, ICLR 2021, arXiv:2103.09762.
    """

    card = Card(
        paper="Saha, Garg & Roy, ICLR 2021",
        arxiv="2103.09762",
        carries="gradients",
        teacher="tasks",
        data="labelled",
    )
    regimes = SHIELDED

    def __init__(self, threshold: float = 0.97, threshold_step: float = 0.003, samples: int = 125, heads: str = "task"):
        super().__init__(threshold=threshold, threshold_step=threshold_step, samples=samples, heads=heads)

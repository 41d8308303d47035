"""TRGP: earlier tasks' directions are left alone, and those that resemble the new task are read through a scaling."""

from __future__ import annotations

from transfuse.continual.cuber import CUBER, SCALED
from transfuse.core.card import Card


class TRGP(CUBER):
    """Trust-region gradient projection: CUBER without its third regime.

        R1 if ||P_j(g)|| <= eps1 ||g||,  else  R2;  the subspaces of all earlier tasks are left alone

    Earlier tasks whose inputs resemble the new one's are read through learned scalings Q and never moved. The
    mechanism, in one piece of code, and the notation are :class:`CUBER`'s.

    Args:
        eps1, threshold, threshold_step, samples, heads: as in :class:`CUBER`.

    Source: Lin, Yang, Fan & Zhang, ICLR 2022, arXiv:2202.02931.
    """

    card = Card(
        paper="Lin, Yang, Fan & Zhang, ICLR 2022",
        arxiv="2202.02931",
        carries="gradients",
        teacher="tasks",
        data="labelled",
    )
    regimes = SCALED

    def __init__(
        self,
        eps1: float = 0.5,
        threshold: float = 0.97,
        threshold_step: float = 0.003,
        samples: int = 125,
        heads: str = "task",
    ):
        super().__init__(eps1=eps1, threshold=threshold, threshold_step=threshold_step, samples=samples, heads=heads)

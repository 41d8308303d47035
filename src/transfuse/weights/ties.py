"""TIES: trim, elect a sign, and average what agrees with it."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.core.card import Card
from transfuse.weights.base import Setting, weights_of
from transfuse.weights.deltas import TaskVectorMerge, elected, of_model, require_share
from transfuse.weights.sparsify import kept, least_kept


class TIES(TaskVectorMerge):
    """Keep the largest changes of each model, elect a sign for each entry, and average those that have it.

        trim:   tau_i keeps its `density` entries of largest magnitude, tensor by tensor
        elect:  sign = sgn(sum_i w_i tau_i)
        merge:  merged = base + scale * mean over the i whose entry has that sign, of tau_i, weighted by w_i

    Args:
        density: share of the entries that survive, for all models or a list with one for each. (mergekit keeps all of
            them unless told otherwise; the paper 0.2.)
        weight: of every model, or a list with one for each.
        scale: of what is added to the base (the paper's lambda).
        normalize: False sums instead of averaging.

    Raises:
        InputError: an argument is out of its range, or there is no base.

    Source: Yadav, Tam, Choshen, Raffel & Bansal, NeurIPS 2023, arXiv:2306.01708.
    """

    card = Card(
        paper="Yadav, Tam, Choshen, Raffel & Bansal, NeurIPS 2023",
        arxiv="2306.01708",
        carries="weights",
        teacher="weights",
        data="none",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )

    def __init__(self, density: Setting = 0.2, weight: Setting = 1.0, scale: Setting = 1.0, normalize: bool = True):
        super().__init__()
        require_share("TIES: density", density)
        self.density, self.weight, self.scale, self.normalize = density, weight, scale, normalize

    def combine(self, key: str, deltas: list[Tensor]) -> Tensor:
        weights, count = weights_of(self.weight, len(deltas), "TIES", normalize=False), len(deltas)
        least = [self._trim(delta, of_model(self.density, i, count, "TIES: density")) for i, delta in enumerate(deltas)]
        return elected(deltas, weights, self.normalize, least).mul_(self.scale)

    def _trim(self, delta: Tensor, density: float) -> float:
        """The smallest magnitude that survives; what is below is left out as signs are elected, in one go."""
        survive = kept(density, delta.numel())
        return least_kept(delta.view(-1), survive) if 0 < survive < delta.numel() else 0.0 if survive else torch.inf

"""SCE: select where models differ, calculate how much each learned, erase minority signs."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.weights.base import Setting
from transfuse.weights.deltas import TaskVectorMerge, elected, require_share
from transfuse.weights.sparsify import least_kept


class SCE(TaskVectorMerge):
    """Weight models by how much they learned in a tensor, at the entries where they differ most.

        select:     the `density` of the entries with the largest variance over the models, of those with any
        calculate:  w_i = mean of tau_i**2 over the tensor, divided by the sum over i
        erase:      entries whose sign is not that of sum_i tau_i
        merged = base + sum_i w_i tau_i / sum_i w_i, over what is left

    Args:
        density: share of the entries with a variance that are kept; mergekit's `select_topk`.

    Raises:
        InputError: density is out of its range, or there is no base.

    Source: Wan, Zhong, Yang, Chen & Quan, 2024, arXiv:2408.07990.
    """

    card = Card(
        paper="Wan, Zhong, Yang, Chen & Quan, 2024",
        arxiv="2408.07990",
        carries="weights",
        teacher="weights",
        data="none",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )

    def __init__(self, density: Setting = 1.0):
        super().__init__()
        require_share("SCE: density", density)
        if density == 0:
            raise InputError("SCE: density is 0, so nothing would be merged")
        self.density = density

    def combine(self, key: str, deltas: list[Tensor]) -> Tensor:
        if self.density < 1:
            variance = torch.stack(deltas).var(0, unbiased=False)
            count = int(self.density * int(variance.count_nonzero()))
            if not count:
                return torch.zeros_like(deltas[0])
            kept = variance >= least_kept(variance.view(-1), count)
            deltas = [delta.mul_(kept) for delta in deltas]
        learned = [float(delta.square().mean()) for delta in deltas]
        if not sum(learned):
            return deltas[0]
        # Electing a sign weighs entries; here they are equal in the election, and weighted in the mean.
        total = torch.stack(deltas).sum(0)
        agreeing = [delta.mul_(torch.where(total >= 0, delta > 0, delta < 0)) for delta in deltas]
        return elected(agreeing, [w / sum(learned) for w in learned], normalize=True)

"""Model Stock: how far to go from the ancestor towards the average, from the angle between models."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.weights.deltas import TaskVectorMerge

SMALLEST = 1e-6


class ModelStock(TaskVectorMerge):
    """Go from the ancestor as far towards the average as the models agree.

        merged = base + t * mean_i tau_i,   t = n cos / (1 + (n - 1) cos)

    with cos the mean cosine of the task vectors of two models, tensor by tensor. Models that learned in the same
    direction are averaged (t = 1), models at right angles give the ancestor (t = 0).

    Args:
        rows: an angle for every row of a tensor, in the place of one for all of it (mergekit's `filter_wise`).

    Raises:
        InputError: there are fewer than two models, or there is no base.

    Source: Jang, Yun & Han, ECCV 2024, arXiv:2403.19522.
    """

    card = Card(
        paper="Jang, Yun & Han, ECCV 2024",
        arxiv="2403.19522",
        carries="weights",
        teacher="weights",
        data="none",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )

    def __init__(self, rows: bool = False):
        super().__init__()
        self.rows = rows

    def combine(self, key: str, deltas: list[Tensor]) -> Tensor:
        count = len(deltas)
        if count < 2:
            raise InputError("ModelStock looks at the angle between models, and there is one: merge at least two")
        flats = [delta.flatten(1) if self.rows and delta.dim() > 1 else delta.view(1, -1) for delta in deltas]
        norms = [flat.norm(dim=1) for flat in flats]
        pairs = combinations(range(count), 2)
        cosines = [(flats[i] * flats[j]).sum(1) / (norms[i] * norms[j]).clamp(min=SMALLEST) for i, j in pairs]
        cosine = torch.stack(cosines).clamp(-1, 1).mean(0)
        below = 1 + (count - 1) * cosine
        # Where the task vectors cancel there is no estimate, and the ancestor stays.
        t = torch.where(below.abs() < SMALLEST, 0, count * cosine / below)
        total = flats[0]
        for flat in flats[1:]:
            total.add_(flat)
        return total.mul_(t[:, None] / count).view_as(deltas[0])

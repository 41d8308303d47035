"""Model breadcrumbs: neither the largest nor the smallest changes."""

from __future__ import annotations

from torch import Tensor

from transfuse.core.card import Card
from transfuse.weights.base import Setting
from transfuse.weights.deltas import Thinned, of_model, require_share
from transfuse.weights.sparsify import keep_middle


class Breadcrumbs(Thinned):
    """Drop the largest changes of each tensor as outliers and the smallest as noise, and sum what is between.

    Args:
        density: share of the entries that survive, for all models or a list with one for each.
        outliers: share of the largest that are dropped (mergekit's `gamma`); the smallest are, to reach the density.
        weight: of every model, or a list with one for each.
        consensus: keep only the entries with the elected sign, as TIES does.
        scale: of what is added to the base.
        normalize: divide by the sum of the weights that counted.

    Raises:
        InputError: an argument is out of its range, or there is no base.

    Source: Davari & Belilovsky, ECCV 2024, arXiv:2312.06795.
    """

    card = Card(
        paper="Davari & Belilovsky, ECCV 2024",
        arxiv="2312.06795",
        carries="weights",
        teacher="weights",
        data="none",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )

    def __init__(
        self,
        density: Setting = 0.9,
        outliers: Setting = 0.01,
        weight: Setting = 1.0,
        consensus: bool = False,
        scale: Setting = 1.0,
        normalize: bool = False,
    ):
        super().__init__()
        require_share("Breadcrumbs: density", density)
        require_share("Breadcrumbs: outliers", outliers)
        self.density, self.outliers, self.weight = density, outliers, weight
        self.consensus, self.scale, self.normalize = consensus, scale, normalize  # type: ignore[misc]

    def thin(self, key: str, number: int, models: int, delta: Tensor) -> Tensor:
        density = of_model(self.density, number, models, "Breadcrumbs: density")
        return keep_middle(delta, density, of_model(self.outliers, number, models, "Breadcrumbs: outliers"))

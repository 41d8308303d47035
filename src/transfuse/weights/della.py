"""DELLA: what is small is dropped more often than what is large."""

from __future__ import annotations

from torch import Tensor

from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.weights.base import Setting
from transfuse.weights.deltas import Thinned, draws, of_model, require_share
from transfuse.weights.sparsify import keep_by_rank


class DELLA(Thinned):
    """Drop entries of task vectors at random, the small ones of a row more often, and scale up the others (MAGPRUNE).

        p = density - spread + 2 spread * (rank of the magnitude in its row, from 0 to 1)
        tau_i -> tau_i * b / p, b ~ Bernoulli(p)

    Args:
        density: share of the entries that survive on average, for all models or a list with one for each.
        spread: how far the probabilities go below and above it; mergekit's `epsilon`. Both ends must be in (0, 1).
        weight: of every model, or a list with one for each.
        consensus: keep only the entries with the elected sign, as TIES does; False is "DELLA linear".
        scale: of what is added to the base.
        normalize: divide by the sum of the weights that counted.
        seed: of what is dropped.

    Raises:
        InputError: an argument is out of its range, or there is no base.

    Source: Deep, Bhardwaj & Poria, 2024, arXiv:2406.11617.
    """

    card = Card(
        paper="Deep, Bhardwaj & Poria, 2024",
        arxiv="2406.11617",
        carries="weights",
        teacher="weights",
        data="none",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )

    def __init__(
        self,
        density: Setting = 0.5,
        spread: Setting = 0.15,
        weight: Setting = 1.0,
        consensus: bool = True,
        scale: Setting = 1.0,
        normalize: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        require_share("DELLA: density", density)
        require_share("DELLA: spread", spread, 0.0, 0.5)
        self.density, self.spread, self.weight, self.scale = density, spread, weight, scale
        self.consensus, self.normalize, self.seed = consensus, normalize, seed  # type: ignore[misc]

    def thin(self, key: str, number: int, models: int, delta: Tensor) -> Tensor:
        density, spread = (
            of_model(value, number, models, f"DELLA: {name}")
            for name, value in (("density", self.density), ("spread", self.spread))
        )
        if density >= 1:
            return delta
        if density - spread <= 0 or density + spread >= 1:
            raise InputError(
                f"DELLA: with density {density} and spread {spread}, probabilities go from {density - spread:g} to "
                f"{density + spread:g}: both ends must be between 0 and 1"
            )
        return keep_by_rank(delta, density, spread, draws(self.seed, key, number))

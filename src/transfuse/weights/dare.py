"""DARE: drop most of what models have learned, and scale up the rest."""

from __future__ import annotations

from torch import Tensor

from transfuse.core.card import Card
from transfuse.weights.base import Setting
from transfuse.weights.deltas import Thinned, draws, of_model, require_share
from transfuse.weights.sparsify import keep_random


class DARE(Thinned):
    """Drop entries of task vectors at random, scale up the others, and sum them.

        tau_i -> tau_i * b / density, b ~ Bernoulli(density) for every entry

    The expectation is the task vector itself. What is dropped follows from the seed and the tensor's name.

    Args:
        density: share of the entries that survive, for all models or a list with one for each.
        weight: of every model, or a list with one for each.
        consensus: keep only the entries with the elected sign, as TIES does ("DARE-TIES").
        scale: of what is added to the base.
        normalize: divide by the sum of the weights that counted.
        seed: of what is dropped.

    Raises:
        InputError: an argument is out of its range, or there is no base.

    Source: Yu, Yu, Yu, Huang & Li, ICML 2024, arXiv:2311.03099.
    """

    card = Card(
        paper="Yu, Yu, Yu, Huang & Li, ICML 2024",
        arxiv="2311.03099",
        carries="weights",
        teacher="weights",
        data="none",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )

    def __init__(
        self,
        density: Setting = 0.5,
        weight: Setting = 1.0,
        consensus: bool = False,
        scale: Setting = 1.0,
        normalize: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        require_share("DARE: density", density)
        self.density, self.weight, self.consensus, self.scale = density, weight, consensus, scale  # type: ignore[misc]
        self.normalize, self.seed = normalize, seed

    def thin(self, key: str, number: int, models: int, delta: Tensor) -> Tensor:
        return keep_random(
            delta, of_model(self.density, number, models, "DARE: density"), draws(self.seed, key, number)
        )

"""The Karcher mean: the point on a sphere that is nearest to all models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.weights.base import Merge
from transfuse.weights.sphere import exponential, logarithm


class Karcher(Merge):
    """Average the directions of models where the sum of squared angles is smallest, and their lengths apart.

        m <- exp_m(mean_i log_m(u_i)), until it does not move,   u_i the models' directions
        merged = mean_i |theta_i| * m

    Args:
        steps: at most.
        tolerance: the length of a step, as an angle, that counts as none.

    Raises:
        InputError: an argument is out of its range.

    Source: Karcher, Communications on Pure and Applied Mathematics 1977.
    """

    card = Card(
        paper="Karcher, Communications on Pure and Applied Mathematics 1977",
        carries="weights",
        teacher="weights",
        data="none",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )

    def __init__(self, steps: int = 10, tolerance: float = 1e-5):
        super().__init__()
        if steps < 1 or not tolerance > 0:
            raise InputError(f"Karcher: steps is {steps} and tolerance {tolerance}: at least 1, and positive")
        self.steps, self.tolerance = steps, tolerance

    def merge(self, key: str, base: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
        flats = [tensor.flatten() for tensor in tensors]
        lengths = [float(flat.norm()) for flat in flats]
        units = [f / length for f, length in zip(flats, lengths, strict=True) if length > self.tolerance]
        if not units:
            return torch.zeros_like(tensors[0])
        mean = torch.zeros_like(units[0])
        for unit in units:
            mean.add_(unit, alpha=1 / len(units))
        length = float(mean.norm())
        mean = units[0].clone() if length < self.tolerance else mean / length
        for _ in range(self.steps):
            tangent = torch.zeros_like(mean)
            for unit in units:
                tangent.add_(logarithm(mean, unit), alpha=1 / len(units))
            if float(tangent.norm()) < self.tolerance:
                break
            mean = exponential(mean, tangent)
            mean /= mean.norm()
        return (mean * (sum(lengths) / len(lengths))).view_as(tensors[0])

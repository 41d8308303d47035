"""Merges of task vectors by their singular vectors: TSV-M and Iso-C."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.core.card import Card
from transfuse.weights.base import Setting
from transfuse.weights.deltas import TaskVectorMerge


class TSVM(TaskVectorMerge):
    """Keep a share of each model's singular vectors, make those of all models orthogonal, and sum.

        tau_i ~ U_i S_i V_i^T, rank min(rows, columns) / n for n models
        merged = base + scale * U S V^T

    with U and V the nearest matrices to [U_1 ... U_n] and [V_1 ... V_n] whose columns are orthonormal. Tensors of
    more than two dimensions are matrices of their first one; vectors are averaged.

    Args:
        scale: of what is added to the base; the paper finds 1 to be near the best.

    Raises:
        InputError: there is no base.

    Source: Gargiulo et al., CVPR 2025, arXiv:2412.00081.
    """

    card = Card(
        paper="Gargiulo et al., CVPR 2025",
        arxiv="2412.00081",
        carries="weights",
        teacher="weights",
        data="none",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )

    def __init__(self, scale: Setting = 1.0):
        super().__init__()
        self.scale = scale

    def combine(self, key: str, deltas: list[Tensor]) -> Tensor:
        if deltas[0].dim() < 2:
            return torch.stack(deltas).mean(0)
        matrices = [delta.flatten(1) for delta in deltas]
        rank = max(1, min(matrices[0].shape) // len(matrices))
        parts = [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
        left = _orthonormal(torch.cat([u[:, :rank] for u, _, _ in parts], 1))
        right = _orthonormal(torch.cat([v[:rank] for _, _, v in parts]).T)
        values = torch.cat([s[:rank] for _, s, _ in parts])
        return (left * values @ right.T).view_as(deltas[0]).mul_(self.scale)


class IsoC(TaskVectorMerge):
    """Sum task vectors and give all their singular directions the same weight.

        sum_i tau_i = U S V^T,   merged = base + scale * mean(S) * U V^T

    Tensors of more than two dimensions are matrices of their first one; vectors are averaged.

    Args:
        scale: of what is added to the base; chosen on validation data in the paper.

    Raises:
        InputError: there is no base.

    Source: Marczak, Magistri, Cygert, Twardowski, Bagdanov & van de Weijer, ICML 2025, arXiv:2502.04959.
    """

    card = Card(
        paper="Marczak et al., ICML 2025",
        arxiv="2502.04959",
        carries="weights",
        teacher="weights",
        data="none",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )

    def __init__(self, scale: Setting = 1.0):
        super().__init__()
        self.scale = scale

    def combine(self, key: str, deltas: list[Tensor]) -> Tensor:
        if deltas[0].dim() < 2:
            return torch.stack(deltas).mean(0)
        left, values, right = torch.linalg.svd(torch.stack(deltas).sum(0).flatten(1), full_matrices=False)
        return (left @ right).mul_(values.mean() * self.scale).view_as(deltas[0])


def _orthonormal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (or rows, where there are fewer)."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right

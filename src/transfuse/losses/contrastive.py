"""Contrast between the samples of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from transfuse.losses._inputs import at_least_float32


def multi_positive_info_nce(features: Tensor, positives: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE in which a sample may have several positives; one value per sample that has any.

    value_i = -log [ sum over positives j of exp(h_i . h_j / temperature)
                     / sum over all j != i of exp(h_i . h_j / temperature) ],  h = feature / |feature|

    Args:
        features: `(batch, dim)`; normalised here.
        positives: boolean `(batch, batch)`, true where column j is a positive of row i; the diagonal is not read.
        temperature: the smaller, the more the hardest negatives count.

    Returns:
        `(anchors,)`; empty where no sample has a positive.

    Raises:
        ValueError: shapes do not belong together, or the temperature is not positive.
    """
    if features.dim() != 2 or positives.shape != (len(features), len(features)):
        raise ValueError(
            f"features of shape {tuple(features.shape)} and positives of shape {tuple(positives.shape)}: "
            "expected (batch, dim) and (batch, batch)"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, found {temperature}")
    h = F.normalize(at_least_float32(features), dim=1)
    itself = torch.eye(len(h), dtype=torch.bool, device=h.device)
    similar = (h @ h.T / temperature).masked_fill(itself, -torch.inf)
    positives = positives & ~itself
    anchors = positives.any(1)
    close = similar[anchors].masked_fill(~positives[anchors], -torch.inf)
    return similar[anchors].logsumexp(1) - close.logsumexp(1)

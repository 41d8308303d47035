"""Losses on the scores by which a router chooses experts for tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.losses._inputs import at_least_float32


def balance_loss(scores: Tensor, top_k: int) -> Tensor:
    """How unevenly experts are used (Fedus et al., 2022, arXiv:2101.03961); 1 where all are used equally.

        E * sum over experts e of f_e P_e

    f_e is the share of the routed slots (tokens times `top_k`) that e is given, P_e its mean probability; only P has a
    gradient. It couples tokens.

    Args:
        scores: `(tokens, experts)`.
        top_k: experts per token.

    Raises:
        ValueError: scores are no matrix with a token, or there are fewer experts than `top_k`.

    >>> balance_loss(torch.eye(4), 1)
    tensor(1.)
    """
    if scores.dim() != 2 or not len(scores) or not 1 <= top_k <= scores.shape[1]:
        raise ValueError(
            f"balance needs scores (tokens, experts) and top_k from 1 to experts, found {tuple(scores.shape)}, {top_k}"
        )
    probabilities = at_least_float32(scores).softmax(-1).mean(0)
    chosen = scores.topk(top_k, -1).indices.flatten()
    shares = torch.bincount(chosen, minlength=scores.shape[1]) / chosen.numel()
    return scores.shape[1] * (shares.to(probabilities.dtype) * probabilities).sum()


def router_z_loss(scores: Tensor) -> Tensor:
    """Squared log-partition of each token's scores (Zoph et al., 2022, arXiv:2202.08906), which keeps them small.

    Args:
        scores: `(..., experts)`.

    Returns:
        `(...)`.
    """
    return at_least_float32(scores).logsumexp(-1).square()

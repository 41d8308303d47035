"""Optimal transport between two sets: how cheaply one can be carried onto the other.

A plan says how much of each row goes to each column; its rows sum to the row weights, its columns to the column
weights, `(rows,)` and `(columns,)` that sum to one, by default all equal. Leading dimensions of a cost are a batch.

Plans are computed in the log domain and without a graph. At the best plan, the derivative of the transported cost
with respect to the cost is the plan itself (envelope theorem), so `(plan * cost).sum()` has the right gradient;
going back through the iterations as well would count it twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.losses._inputs import at_least_float32
from transfuse.losses.feature import unit


def cosine_cost(one: Tensor, other: Tensor) -> Tensor:
    """One minus the cosine of every pair, `(..., rows, width)` and `(..., columns, width)` to `(..., rows, columns)`.

    A row of zeros costs one to everything.

    Raises:
        ValueError: widths differ.
    """
    if one.shape[-1] != other.shape[-1]:
        raise ValueError(f"both sides need the same width, found {tuple(one.shape)} and {tuple(other.shape)}")
    with torch.autocast(one.device.type, enabled=False):  # it would multiply in half precision
        return 1 - unit(at_least_float32(one)) @ unit(at_least_float32(other)).mT


def cut_cost(cost: Tensor, share: float = 0.1) -> Tensor:
    """Make the cheapest pairs free: `relu(cost - (min + share * (max - min)))`, for each cost matrix.

    The threshold is not differentiated. (Chen et al., ICML 2020, arXiv:2006.14744.)
    """
    low, high = (end(cost.detach(), dim=(-2, -1), keepdim=True) for end in (torch.amin, torch.amax))
    return (cost - (low + share * (high - low))).relu()


@torch.no_grad()
def sinkhorn(
    cost: Tensor,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    *,
    epsilon: float = 0.05,
    iterations: int = 50,
) -> Tensor:
    """The plan of least cost minus epsilon times its entropy (Cuturi, NeurIPS 2013, arXiv:1306.0895).

    Args:
        cost: `(..., rows, columns)`.
        rows, columns: weights, all equal by default; zero is allowed.
        epsilon: the smaller, the closer to the cheapest plan, and the more iterations it takes.
        iterations: of fitting the row sums and then the column sums; the latter are exact.

    Returns:
        `(..., rows, columns)`, without a graph.

    Raises:
        ValueError: the cost is no matrix, weights do not fit it, or epsilon is not positive.

    >>> sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).round(decimals=4)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, found {epsilon}: ipot() finds the plan without smoothing")
    log_rows, log_columns = _log_weights(cost, rows, columns)
    log_kernel = -at_least_float32(cost) / epsilon
    scale = torch.zeros_like(log_kernel[..., :1, :])
    return _fit(log_kernel, scale, log_rows, log_columns, iterations)[0].exp()


@torch.no_grad()
def ipot(
    cost: Tensor,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    *,
    beta: float = 0.5,
    iterations: int = 50,
    inner: int = 1,
) -> Tensor:
    """The cheapest plan itself, by the inexact proximal point method (Xie et al., UAI 2019, arXiv:1802.04307).

    Every outer iteration is a few steps of Sinkhorn from the plan before, so that smoothing fades as 1 / iterations:

        Q = exp(-cost / beta) * T;  inner times: delta = rows / (Q sigma), sigma = columns / (Q' delta);
        T = diag(delta) Q diag(sigma)

    Args:
        cost: `(..., rows, columns)`.
        rows, columns: weights, all equal by default; zero is allowed.
        beta: step size; the greater, the smaller a step.
        iterations, inner: outer and inner iterations; column sums are exact.

    Returns:
        `(..., rows, columns)`, without a graph.

    Raises:
        ValueError: the cost is no matrix, weights do not fit it, or beta is not positive.

    >>> ipot(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).round(decimals=4)
    tensor([[0.0000, 0.5000],
            [0.5000, 0.0000]])
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, found {beta}")
    log_rows, log_columns = _log_weights(cost, rows, columns)
    log_kernel = -at_least_float32(cost) / beta
    log_plan, scale = torch.zeros_like(log_kernel), torch.zeros_like(log_kernel[..., :1, :])
    for _ in range(iterations):
        log_plan, scale = _fit(log_kernel + log_plan, scale, log_rows, log_columns, inner)
    return log_plan.exp()


def _fit(
    log_kernel: Tensor, scale: Tensor, log_rows: Tensor, log_columns: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """Scale rows and columns of a kernel until they sum to the weights; also the columns' scale, all in logarithms."""
    for _ in range(iterations):
        other = log_rows - (log_kernel + scale).logsumexp(-1, keepdim=True)
        scale = log_columns - (log_kernel + other).logsumexp(-2, keepdim=True)
    return log_kernel + other + scale, scale


def _log_weights(cost: Tensor, rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logarithms of the weights, as a column and as a row."""
    if cost.dim() < 2:
        raise ValueError(f"a cost must be (..., rows, columns), found {tuple(cost.shape)}")
    return (
        _log_weight("rows", rows, cost.shape[-2], cost).unsqueeze(-1),
        _log_weight("columns", columns, cost.shape[-1], cost).unsqueeze(-2),
    )


def _log_weight(side: str, weights: Tensor | None, size: int, cost: Tensor) -> Tensor:
    if weights is None:
        weights = torch.full((size,), 1 / size, device=cost.device)
    if weights.shape[-1] != size:
        raise ValueError(f"the weights of the {side} are {tuple(weights.shape)}, the cost has {size} {side}")
    return at_least_float32(weights).clamp(min=1e-30).log()  # a weight of zero would make 0 / 0 of its row

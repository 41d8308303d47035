"""The part of a larger matrix that matters most, and its best approximation of low rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def best_window(scores: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows `(a,)` and columns `(b,)` of the contiguous a x b window whose scores have the largest sum.

    All windows at once, from a summed-area table P: the sum of rows i to k, columns j to l is
    P[k, l] - P[i - 1, l] - P[k, j - 1] + P[i - 1, j - 1]. Of equal windows the first row, then the first column wins.

    Args:
        scores: `(m, n)`, m >= a and n >= b.
    """
    _require_fit(scores, shape)
    (a, b), table = shape, F.pad(scores.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    sums = table[a:, b:] - table[:-a, b:] - table[a:, :-b] + table[:-a, :-b]
    # What differs by rounding of the table alone is equal.
    equal = sums >= sums.max() - 1e-12 * table[-1, -1].abs()
    row, column = divmod(int(equal.flatten().int().argmax()), sums.shape[1])
    return torch.arange(row, row + a), torch.arange(column, column + b)


def best_rows_columns(scores: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The a rows and the b columns with the largest mean score, each in its order, `(a,)` and `(b,)`."""
    _require_fit(scores, shape)
    (a, b), means = shape, (scores.double().mean(1), scores.double().mean(0))
    rows, columns = (
        m.argsort(descending=True, stable=True)[:k].sort().values for m, k in zip(means, (a, b), strict=True)
    )
    return rows, columns


def low_rank(matrix: Tensor, rank: int, balanced: bool = False) -> tuple[Tensor, Tensor]:
    """B `(a, rank)` and A `(rank, b)` whose product is the closest matrix of that rank (Eckart & Young, 1936).

        matrix = U S V^T;   B = U S, A = V^T of the largest singular values

    A rank beyond the matrix' own leaves columns and rows of zeros.

    Args:
        matrix: `(a, b)`. balanced: give the root of S to either factor.
    """
    u, s, vt = torch.linalg.svd(matrix.float(), full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    b, a = (u * s.sqrt(), s.sqrt()[:, None] * vt) if balanced else (u * s, vt)
    missing = max(0, rank - len(s))
    return F.pad(b, (0, missing)), F.pad(a, (0, 0, 0, missing))


def _require_fit(scores: Tensor, shape: tuple[int, int]) -> None:
    if scores.dim() != 2 or not all(0 < part <= whole for part, whole in zip(shape, scores.shape, strict=True)):
        raise ValueError(f"a window of {shape} does not fit into a matrix of {tuple(scores.shape)}")

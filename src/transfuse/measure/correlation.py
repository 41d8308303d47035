"""Whether a score agrees with results: Pearson's and Spearman's coefficients.

A score of transferability is worth what it says about transfers that were made: give both for a pool of sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from transfuse.core.errors import InputError, ShapeError
from transfuse.measure.base import Table


def pearson(one: Sequence[float] | Tensor, other: Sequence[float] | Tensor) -> float:
    """Linear correlation, in [-1, 1]; NaN where one side does not vary.

    Raises:
        ShapeError: the two are not equally long, or shorter than 2.
    """
    x, y = (torch.as_tensor(side, dtype=torch.float64) for side in (one, other))
    if x.dim() != 1 or x.shape != y.shape or len(x) < 2:
        raise ShapeError(
            f"a correlation is between two equally long rows of 2 numbers or more, found {tuple(x.shape)} "
            f"and {tuple(y.shape)}"
        )
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x.norm() * y.norm()))


def spearman(one: Sequence[float] | Tensor, other: Sequence[float] | Tensor) -> float:
    """Correlation of ranks, ties sharing their mean rank; as :func:`pearson` otherwise."""
    return pearson(*(_ranks(torch.as_tensor(side, dtype=torch.float64)) for side in (one, other)))


def agreement_with_results(scores: Table, results: Mapping[str, float]) -> Table:
    """How each column of scores goes along with results, over the rows: columns `"pearson"` and `"spearman"`.

    Args:
        scores: one row per source.
        results: what came of a transfer from each source, for example its test loss.

    Raises:
        InputError: a row has no result.
    """
    if missing := [row for row in scores.rows if row not in results]:
        raise InputError(f"there is no result for the source {missing[0]!r}, only for {', '.join(results)}")
    outcome = [results[row] for row in scores.rows]
    columns = scores.values.T
    values = [[pearson(column, outcome), spearman(column, outcome)] for column in columns]
    return Table(scores.columns, ("pearson", "spearman"), torch.tensor(values, dtype=torch.float64))


def _ranks(values: Tensor) -> Tensor:
    smaller = (values[None, :] < values[:, None]).sum(dim=1)
    equal = (values[None, :] == values[:, None]).sum(dim=1)
    return smaller + (equal + 1) / 2

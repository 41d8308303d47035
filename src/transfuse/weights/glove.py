"""GloVe: a vector for every token of a vocabulary, from which tokens stand near which in a corpus.

Whatever the ids mean: nothing here knows text. Torch only, sparse, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from transfuse.core.errors import InputError

CELLS, STEPS = 4096, 100
"""Cells that are learned from at once, at most, and steps in an iteration, at least: a small matrix needs them too."""


@dataclass(frozen=True)
class Cooccurrence:
    """The cells of a symmetric matrix that are not zero.

    Attributes:
        rows, columns: `(cells,)` ids; counts: `(cells,)`, each meeting counted as 1 / distance.
        frequency: `(size,)` how often each id came.
    """

    rows: Tensor
    columns: Tensor
    counts: Tensor
    frequency: Tensor


@dataclass(frozen=True)
class Vectors:
    """What has been learned.

    Attributes:
        vectors: `(size, dimension)`, w + c; zero where nothing is known.
        known: `(size,)` ids that came often enough.
        losses: mean loss of the cells in each iteration.
    """

    vectors: Tensor
    known: Tensor
    losses: tuple[float, ...]


def cooccurrence(texts: Iterable[Tensor], size: int, window: int = 15) -> Cooccurrence:
    """Count how near tokens stand to each other; no window reaches from one text into another.

    Args:
        texts: batches `(texts, tokens)` of ids; negative ones are padding.
        size: of the vocabulary.
        window: the largest distance.

    Raises:
        InputError: an id is beyond the vocabulary, or the window is below 1.
    """
    if window < 1:
        raise InputError(f"window is {window}, it must be at least 1")
    cells, counts = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.float64)
    frequency = torch.zeros(size, dtype=torch.long)
    for ids in texts:
        real = ids >= 0
        if bool((ids >= size).any()):
            raise InputError(f"the text has the id {int(ids.max())}, the vocabulary {size} tokens")
        frequency += torch.bincount(ids[real], minlength=size)
        found = [cells]
        weights = [counts]
        for distance in range(1, min(window, ids.shape[1] - 1) + 1):
            left, right = ids[:, :-distance], ids[:, distance:]
            both = real[:, :-distance] & real[:, distance:]
            found.append(left[both] * size + right[both])
            weights.append(torch.full((len(found[-1]),), 1 / distance, dtype=torch.float64))
        cells, place = torch.cat(found).unique(return_inverse=True)
        counts = torch.zeros(len(cells), dtype=torch.float64).index_add_(0, place, torch.cat(weights))
    rows, columns = cells // size, cells % size
    # Counted from left to right; the matrix is that and its mirror image.
    both_ways = torch.cat([rows * size + columns, columns * size + rows])
    cells, place = both_ways.unique(return_inverse=True)
    counts = torch.zeros(len(cells), dtype=torch.float64).index_add_(0, place, counts.repeat(2))
    return Cooccurrence(cells // size, cells % size, counts.float(), frequency)


def weight(counts: Tensor, x_max: float, alpha: float = 0.75) -> Tensor:
    """How much a cell counts: (X / x_max)**alpha, at most 1."""
    return (counts / x_max).clamp(max=1.0) ** alpha


def glove(
    found: Cooccurrence,
    dimension: int = 300,
    iterations: int = 15,
    x_max: float = 10.0,
    min_count: int = 5,
    alpha: float = 0.75,
    lr: float = 0.05,
    seed: int = 0,
) -> Vectors:
    """Vectors whose products are the logarithms of co-occurrence counts.

        loss = sum_ij f(X_ij) * (w_i . c_j + b_i + d_j - log X_ij)**2,    f(x) = min(1, (x / x_max)**alpha)

    By AdaGrad on the cells that are not zero, in a new random order in each iteration.

    Args:
        found: counts.
        dimension, iterations, x_max, alpha, lr: as in the formula and its descent.
        min_count: ids that came less often have no vector.

    Raises:
        InputError: no id came often enough beside another.

    Source: Pennington, Socher & Manning, EMNLP 2014.
    """
    draws = torch.Generator().manual_seed(seed)
    size = len(found.frequency)
    known = found.frequency >= min_count
    kept = known[found.rows] & known[found.columns]
    rows, columns, counts = found.rows[kept], found.columns[kept], found.counts[kept]
    if len(rows) == 0:
        raise InputError(f"no token came {min_count} times beside another: give more text, or a smaller min_count")
    importance, wanted = weight(counts, x_max, alpha), counts.log()
    w, c = ((torch.rand(size, dimension, generator=draws) - 0.5) / dimension for _ in range(2))
    b, d = torch.zeros(size), torch.zeros(size)
    squares = [torch.ones_like(table) for table in (w, c, b, d)]
    at_once, losses = min(CELLS, -(-len(rows) // STEPS)), []
    for _ in range(iterations):
        total = 0.0
        for cells in torch.randperm(len(rows), generator=draws).split(at_once):
            i, j = rows[cells], columns[cells]
            ours, theirs = w.index_select(0, i), c.index_select(0, j)  # much faster than w[i] here
            error = (ours * theirs).sum(1) + b[i] + d[j] - wanted[cells]
            slope = importance[cells] * error
            total += float((slope * error).sum())
            for ids, tables in ((i, (0, 2)), (j, (1, 3))):
                touched, place = ids.unique(return_inverse=True)
                gradients = ((theirs, ours)[tables[0]] * slope[:, None], slope)
                for number, gradient in zip(tables, gradients, strict=True):
                    _adagrad((w, c, b, d)[number], squares[number], touched, place, gradient, lr)
        losses.append(total / len(rows))
    return Vectors((w + c) * known[:, None], known, tuple(losses))


def _adagrad(table: Tensor, squares: Tensor, rows: Tensor, place: Tensor, gradients: Tensor, lr: float) -> None:
    """One step on some rows, in place; `place` says to which of them each gradient belongs."""
    total = torch.zeros(len(rows), *table.shape[1:]).index_add_(0, place, gradients)
    squared = squares.index_select(0, rows) + total.square()
    squares[rows] = squared
    table[rows] -= lr * total / squared.sqrt()

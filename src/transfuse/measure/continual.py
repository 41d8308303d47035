"""What is kept, lost and gained over a stream of tasks, from the result matrix.

Entry (i, j) of the matrix is the score on task j's held-out data after task i has been learned, counted from 0. What
was not measured is NaN; each function says which entries it reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from transfuse.core.errors import InputError, ShapeError


def result_matrix(stages: Sequence[Mapping[str, float]]) -> Tensor:
    """The result matrix `(tasks, tasks)` from the scores by set after every stage, as a transfer gives them.

    Raises:
        ShapeError: not every set was scored after every stage, or there are not as many sets as stages.
    """
    names = list(stages[0]) if stages else []
    if not stages or len(names) != len(stages) or any(list(row) != names for row in stages):
        raise ShapeError(
            f"a result matrix needs the same held-out set for every task after every stage, found {len(stages)} stages "
            f"with {[len(row) for row in stages]} sets"
        )
    return torch.tensor([list(row.values()) for row in stages], dtype=torch.float64)


def final_accuracy(results: Tensor) -> float:
    """ACC, the mean over all tasks after the last one: reads the last row.

    (Lopez-Paz & Ranzato, NeurIPS 2017, arXiv:1706.08840.)
    """
    results = _checked(results)
    return _mean(results[-1], "final accuracy")


def backward_transfer(results: Tensor) -> float:
    """BWT, the mean over all tasks but the last of score at the end minus score when learned; negative is forgetting.

    Reads the last row and the diagonal. (Lopez-Paz & Ranzato, NeurIPS 2017, arXiv:1706.08840.)
    """
    results = _checked(results, least=2)
    return _mean((results[-1] - results.diagonal())[:-1], "backward transfer")


def forward_transfer(results: Tensor, untrained: Tensor) -> float:
    """FWT, the mean over all tasks but the first of score just before it is learned minus that of an untrained model.

    Reads the entries above the diagonal. (Lopez-Paz & Ranzato, NeurIPS 2017, arXiv:1706.08840.)

    Args:
        untrained: `(tasks,)`, scores of the target as it was before the first task.
    """
    results = _checked(results, least=2)
    if untrained.shape != results.shape[:1]:
        raise ShapeError(f"expected {len(results)} scores of the untrained model, found {tuple(untrained.shape)}")
    return _mean(results.diagonal(1) - untrained.double()[1:], "forward transfer")


def forgetting(results: Tensor) -> float:
    """The mean over all tasks but the last of the best score it ever had before the end minus its score at the end.

    Reads the diagonal and what is below it. (Chaudhry et al., ECCV 2018, arXiv:1801.10112.)
    """
    results = _checked(results, least=2)
    best = torch.stack([results[j:-1, j].max() for j in range(len(results) - 1)])
    return _mean(best - results[-1, :-1], "forgetting")


def average_accuracy(results: Tensor, sizes: Tensor | None = None) -> float:
    """The mean over stages of the score on everything seen so far; in class-incremental learning A-bar.

    Reads the diagonal and what is below it.

    Args:
        sizes: `(tasks,)` held-out samples of each task, which weigh tasks within a stage; None weighs them alike.
    """
    results = _checked(results)
    weights = torch.ones(len(results)).double() if sizes is None else sizes.double()
    if weights.shape != results.shape[:1]:
        raise ShapeError(f"expected {len(results)} sizes of held-out sets, found {tuple(weights.shape)}")
    seen = [(results[i, : i + 1] * weights[: i + 1]).sum() / weights[: i + 1].sum() for i in range(len(results))]
    return _mean(torch.stack(seen), "average accuracy")


def _checked(results: Tensor, least: int = 1) -> Tensor:
    if results.dim() != 2 or results.shape[0] != results.shape[1] or len(results) < least:
        raise ShapeError(
            f"expected a result matrix (tasks, tasks) of at least {least} task(s), found {tuple(results.shape)}"
        )
    return results.double()


def _mean(values: Tensor, what: str) -> float:
    if not values.isfinite().all():
        raise InputError(f"{what} needs entries of the result matrix that were not measured (NaN)")
    return float(values.mean())

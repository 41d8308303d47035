"""Losses between the relations that a student and a teacher see among the samples of a batch.

They are batch-coupled: a scalar that is not a sum over samples, to be wrapped as `Term(value)` and counted
once per micro-batch. The two sides may differ in width. Losses on each sample's own features are in
:mod:`transfuse.losses.feature`.

Relational knowledge distillation: Park et al., 2019, arXiv:1904.05068. The paper sums over tuples of samples;
its authors' code averages over the whole table of pairs (batch**2) or triplets (batch**3), including those
that repeat a sample. So does this module, and weights published with that code carry over.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from transfuse.losses._inputs import at_least_float32
from transfuse.losses.feature import unit


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between pairwise distances, each side's divided by its mean over the pairs of samples.

    Args:
        student: embeddings, `(batch, features)`; further dimensions are flattened.
        teacher: embeddings of the same samples, of any width.

    Returns:
        Scalar. Rows that coincide have distance zero and give each other no gradient. With two samples it is
        always zero: their only distance is its own mean.

    Raises:
        ValueError: batches differ, or there are fewer than two samples.

    >>> line = torch.tensor([[0.0], [1.0], [3.0]])
    >>> rkd_distance(line, 5 * line)  # distances count up to a common factor
    tensor(0.)
    """
    student, teacher = _embeddings(student, teacher, fewest=2)
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the cosines of the angles that every triplet of samples forms at its middle sample.

    Takes memory of batch**2 * features + batch**3 values per side.

    Args:
        student: embeddings, `(batch, features)`; further dimensions are flattened.
        teacher: embeddings of the same samples, of any width.

    Returns:
        Scalar. An angle between rows that coincide counts as a right angle and has no gradient.

    Raises:
        ValueError: batches differ, or there are fewer than three samples.
    """
    student, teacher = _embeddings(student, teacher, fewest=3)
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher))


def _embeddings(student: Tensor, teacher: Tensor, fewest: int) -> tuple[Tensor, Tensor]:
    if min(student.dim(), teacher.dim()) < 2 or len(student) != len(teacher):
        raise ValueError(
            "embeddings must be (batch, features) of the same samples, found "
            f"{tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher)"
        )
    if len(student) < fewest:
        raise ValueError(
            f"this relation is between {fewest} samples, found {len(student)}: use larger micro-batches and "
            f"drop the last incomplete one"
        )
    return at_least_float32(student).flatten(1), at_least_float32(teacher).flatten(1)


def _relative_distances(rows: Tensor) -> Tensor:
    # The matrix-product form of cdist is faster, but wrong by rounding for rows that are close.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (len(rows) * (len(rows) - 1))
    return distances / mean.masked_fill(mean == 0, 1.0)


def _cosines(rows: Tensor) -> Tensor:
    directions = unit(rows[None, :] - rows[:, None])  # [j, i] points from j to i
    with torch.autocast(rows.device.type, enabled=False):  # it would multiply in half precision
        return directions @ directions.mT  # [j, i, k]: the angle at j

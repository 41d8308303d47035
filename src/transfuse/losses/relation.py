"""Losses between the relations that two models see, or that hold in two domains, among the samples of a batch.

They are batch-coupled: a scalar that is not a sum over samples, to be wrapped as `Term(value)` and counted
once per micro-batch. The two sides may differ in width. Losses on each sample's own features are in
:mod:`transfuse.losses.feature`.

Relational knowledge distillation: Park et al., 2019, arXiv:1904.05068. The paper sums over tuples of samples;
its authors' code averages over the whole table of pairs (batch**2) or triplets (batch**3), including those
that repeat a sample. So does this module, and weights published with that code carry over.

Maximum mean discrepancy: Gretton et al., JMLR 2012; with several kernels: Long et al., 2015, arXiv:1502.02791.

Distance correlation: Székely, Rizzo and Bakirov, 2007; unbiased and partial: Székely and Rizzo, 2014,
arXiv:1310.2926. The biased and the unbiased one are different numbers, never to be compared with each other.
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


def mmd(source: Tensor, target: Tensor, *, kernels: int = 5, unbiased: bool = False) -> Tensor:
    """Squared maximum mean discrepancy between two samples, with a mean of Gaussian kernels.

        MMD**2 = mean k(s, s') + mean k(t, t') - 2 mean k(s, t)
        k(x, y) = mean_i exp(-|x - y|**2 / (2**i * b)),  i = -(kernels // 2), ..., kernels - 1 - kernels // 2

    b is the mean squared distance between different rows of both samples together; no gradient flows through it.

    Args:
        source: features, `(samples, width)`; further dimensions are flattened.
        target: features of the same width; the number of samples may differ.
        kernels: how many bandwidths, each twice the one before.
        unbiased: leave pairs of a row with itself out of the first two means. The estimate is then right on
            average, and may be negative. With those pairs it never is, and it is zero between equal samples.

    Returns:
        Scalar, batch-coupled.

    Raises:
        ValueError: widths differ, or a sample has no row (two are needed without bias).
    """
    fewest = 2 if unbiased else 1
    if min(source.dim(), target.dim()) < 2 or source.shape[1:] != target.shape[1:]:
        raise ValueError(
            f"two samples of one feature are compared, found {tuple(source.shape)} (source) and "
            f"{tuple(target.shape)} (target): they may differ in the number of samples only"
        )
    if min(len(source), len(target)) < fewest or kernels < 1:
        raise ValueError(f"mmd needs {fewest} sample(s) on each side, found {len(source)} and {len(target)}")
    rows = torch.cat([at_least_float32(source).flatten(1), at_least_float32(target).flatten(1)])
    # The matrix-product form of cdist is faster, but wrong by rounding for rows that are close.
    squares = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    mean = squares.detach().sum() / (len(rows) * (len(rows) - 1))
    mean = mean.masked_fill(mean == 0, 1.0)
    similar = torch.stack([(-squares / (2.0**i * mean)).exp() for i in _octaves(kernels)]).mean(0)
    n, m = len(source), len(target)
    here, there, across = similar[:n, :n], similar[n:, n:], similar[:n, n:].mean()
    if unbiased:
        return (here.sum() - n) / (n * (n - 1)) + (there.sum() - m) / (m * (m - 1)) - 2 * across
    value = here.mean() + there.mean() - 2 * across
    return value - value.detach().clamp(max=0)  # rounding may end below zero; the gradient is right even then


def _octaves(kernels: int) -> range:
    return range(-(kernels // 2), kernels - kernels // 2)


def distance_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Squared distance correlation, biased: `mean(A * B) / sqrt(mean(A * A) * mean(B * B))`.

    A and B are the distances within each side, less the means of their row and column, plus the mean of all. It is 1
    for one set of points and itself (turned, moved or scaled), and above 0 for independent ones, the more the fewer
    samples there are. No root is taken of the quotient.

    Args:
        one, other: features of the same samples, `(samples, features)`, each of any width.

    Returns:
        Scalar in [0, 1].

    Raises:
        ValueError: samples differ, or there are fewer than two.
    """
    one, other = _embeddings(one, other, fewest=2)
    a, b = (_double_centred(_distances(side)) for side in (one, other))
    return (a * b).mean() / ((a * a).mean() * (b * b).mean() + _TINY).sqrt()


def u_centred(features: Tensor) -> Tensor:
    """Distances between samples, centred so that their products are free of bias (U-centring).

    P_ij = D_ij - sum_l D_lj / (n-2) - sum_l D_il / (n-2) + sum_kl D_kl / ((n-1)(n-2)) off the diagonal, P_ii = 0

    Args:
        features: `(samples, features)`; further dimensions are flattened.

    Returns:
        `(samples, samples)`, rows and columns add up to 0. Rows that coincide give each other no gradient.

    Raises:
        ValueError: fewer than four samples.
    """
    n = len(features)
    if features.dim() < 2 or n < 4:
        raise ValueError(f"U-centring needs features of 4 samples or more, found the shape {tuple(features.shape)}")
    distances = _distances(at_least_float32(features).flatten(1))
    sums = distances.sum(dim=0)
    centred = distances - (sums[None, :] + sums[:, None]) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    return centred * (1 - torch.eye(n, dtype=centred.dtype, device=centred.device))


def u_product(one: Tensor, other: Tensor) -> Tensor:
    """Inner product of U-centred distances, `sum_ij P_ij Q_ij / (n (n-3))`: 0 on average for independent features."""
    n = len(one)
    return (one * other).sum() / (n * (n - 3))


def u_removed(one: Tensor, other: Tensor) -> Tensor:
    """What is left of U-centred distances without the part along others: `P - <P, Q> / <Q, Q> Q`.

    A remainder as small as rounding in single precision becomes exactly 0; if Q is 0, all of P is left.

    Args:
        one, other: P and Q, `(samples, samples)`, as :func:`u_centred` makes them.
    """
    left = one - u_product(one, other) / (u_product(other, other) + _TINY) * other
    return left * (u_product(left, left) > _ROUNDING**2 * u_product(one, one))


def u_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Correlation of U-centred distances, `<P, Q> / sqrt(<P, P> <Q, Q>)` in [-1, 1]; 0 where one of them is 0."""
    return u_product(one, other) / (u_product(one, one) * u_product(other, other) + 1e-18).sqrt()


_TINY, _ROUNDING = 1e-12, 1e-5


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


def _distances(rows: Tensor) -> Tensor:
    # The matrix-product form of cdist is faster, but wrong by rounding for rows that are close.
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


def _double_centred(distances: Tensor) -> Tensor:
    rows = distances.mean(dim=1, keepdim=True)
    return distances - rows - rows.mT + rows.mean()


def _relative_distances(rows: Tensor) -> Tensor:
    distances = _distances(rows)
    mean = distances.sum() / (len(rows) * (len(rows) - 1))
    return distances / mean.masked_fill(mean == 0, 1.0)


def _cosines(rows: Tensor) -> Tensor:
    directions = unit(rows[None, :] - rows[:, None])  # [j, i] points from j to i
    with torch.autocast(rows.device.type, enabled=False):  # it would multiply in half precision
        return directions @ directions.mT  # [j, i, k]: the angle at j

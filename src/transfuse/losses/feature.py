"""Losses between the features of a student and a teacher, one value per sample.

Features of different width must be projected before they come here. Losses on the *relations* between the
samples of a batch, which need no common width, are in :mod:`transfuse.losses.relation`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transfuse.losses._inputs import at_least_float32, require_same_shape


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of the squared differences of each sample (FitNets: Romero et al., 2015, arXiv:1412.6550).

    Args:
        student: features, `(batch, ...)` with at least two dimensions.
        teacher: features of the same shape.

    Returns:
        `(batch,)`, the mean over everything but the batch axis.

    Raises:
        ValueError: shapes differ, or there is no axis to average over.
    """
    return _difference(student, teacher).square().mean(1)


def mean_absolute_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of the absolute differences of each sample, of features or of raw logits.

    Args:
        student: `(batch, ...)` with at least two dimensions.
        teacher: the same shape.

    Returns:
        `(batch,)`, the mean over everything but the batch axis.

    Raises:
        ValueError: shapes differ, or there is no axis to average over.
    """
    return _difference(student, teacher).abs().mean(1)


def _difference(student: Tensor, teacher: Tensor) -> Tensor:
    require_same_shape(student, teacher)
    if student.dim() < 2:
        raise ValueError(f"features must be (batch, ...) with two dimensions or more, found {student.dim()}")
    return (at_least_float32(student) - at_least_float32(teacher)).flatten(1)


def attention_map(feature: Tensor, power: float = 2) -> Tensor:
    """Where a feature map is active: mean over channels of |feature|**power, as a vector of length one.

    Args:
        feature: `(batch, channels, height, width)`.
        power: 1 or more; the greater, the more the strongest channels count.

    Returns:
        `(batch, height * width)`. The map of a feature that is zero everywhere is zero.

    Raises:
        ValueError: the feature has not four dimensions, or the power is below 1 (it would give dead units an
            infinite gradient).

    >>> attention_map(torch.tensor([[[[3.0, 0.0], [0.0, 4.0]]]]), power=1)
    tensor([[0.6000, 0.0000, 0.0000, 0.8000]])
    """
    if feature.dim() != 4:
        raise ValueError(
            f"an attention map needs a feature (batch, channels, height, width), found {tuple(feature.shape)}"
        )
    if power < 1:
        raise ValueError(f"power must be 1 or more, found {power}: the paper uses 2")
    return unit(at_least_float32(feature).abs().pow(power).mean(1).flatten(1))


def attention_transfer(student: Tensor, teacher: Tensor, power: float = 2) -> Tensor:
    """Distance between the attention maps of each sample (Zagoruyko & Komodakis, 2017, arXiv:1612.03928).

    This is the paper's equation 2: the L2 norm of the difference of the normalised maps, for one pair of
    layers and without the factor beta / 2, which is the weight of the term. The authors' published code
    averages the *squared* differences instead, so its weights do not carry over. Where the maps are equal the
    norm has no derivative; the gradient is zero there.

    Args:
        student: `(batch, channels, height, width)`.
        teacher: same batch, height and width; the number of channels may differ.
        power: see :func:`attention_map`.

    Returns:
        `(batch,)`, between 0 and sqrt(2).

    Raises:
        ValueError: batches or spatial sizes differ, or as in :func:`attention_map`.
    """
    student_map, teacher_map = attention_map(student, power), attention_map(teacher, power)
    if student[:, 0].shape != teacher[:, 0].shape:
        raise ValueError(
            f"attention maps need equal batch, height and width, found {tuple(student.shape)} (student) and "
            f"{tuple(teacher.shape)} (teacher): resize one feature, e.g. with adaptive_avg_pool2d"
        )
    return torch.linalg.vector_norm(student_map - teacher_map, dim=1)


def unit(vectors: Tensor) -> Tensor:
    """Vectors of length one along the last axis; a zero vector stays zero and receives a gradient of zero."""
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norm.masked_fill(norm == 0, math.inf)

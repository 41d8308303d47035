"""What teaches a generator that sees no data: statistics, balance and disagreement of a frozen teacher's answers.

All of it couples the samples of a batch, except :func:`agreeing_divergence`, which has one value per sample. How
sure and how balanced a teacher's answers are is in :mod:`transfuse.losses.information`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from transfuse.losses._inputs import at_least_float32, require_same_shape
from transfuse.losses.divergence import kl_divergence


def batch_norm_distance(inputs: Sequence[Tensor], means: Sequence[Tensor], variances: Sequence[Tensor]) -> Tensor:
    """Sum over layers of |batch mean - running mean| + |batch variance - running variance|, Euclidean norms.

    (DeepInversion: Yin et al., CVPR 2020, arXiv:1912.08795.) Zero where a batch looks like the data that the layers'
    running statistics were collected from.

    Args:
        inputs: of each batch-normalisation layer, `(batch, channels, ...)`.
        means, variances: the running statistics of each layer, `(channels,)`.

    Raises:
        ValueError: there is no layer, the numbers of layers differ, or a layer counts other channels.
    """
    if not inputs or not len(inputs) == len(means) == len(variances):
        raise ValueError(
            f"found inputs of {len(inputs)} layers, {len(means)} means and {len(variances)} variances: "
            "give each layer's, of at least one layer"
        )
    total = at_least_float32(inputs[0]).new_zeros(())
    for given, mean, variance in zip(inputs, means, variances, strict=True):
        channels = at_least_float32(given).transpose(0, 1).flatten(1)
        if len(channels) != len(mean):
            raise ValueError(f"an input of shape {tuple(given.shape)} has not the {len(mean)} channels of its layer")
        found, centre = torch.var_mean(channels, dim=1, correction=0)
        total = total + torch.linalg.vector_norm(centre - mean) + torch.linalg.vector_norm(found - variance)
    return total


def agreeing_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each sample on whose class both agree, exactly 0 of the others, `(batch,)`.

    Where they disagree the student has something to learn already; asking for more would lead a generator off the
    teacher's classes.

    Args:
        student, teacher: logits, `(batch, classes)`.
    """
    agree = student.argmax(1) == teacher.argmax(1)
    return torch.where(agree, kl_divergence(student, teacher), 0.0)


def clamped_jensen_shannon(
    student: Tensor, teacher: Tensor, *, temperature: float = 3.0, least: float = 0.01
) -> Tensor:
    """J = 1/2 [KL(m || t) + KL(m || s)] for the mixture m, averaged over samples *and classes*.

    (DeepInversion's adaptive competition.) All three distributions are softened and then clamped to
    [least, 1 - least], without being normalised again. Because classes are averaged over, its pull shrinks as
    their number grows.

    Args:
        student, teacher: logits, `(batch, classes)`.
        temperature: divides both.
        least: bound of the probabilities.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape(student, teacher)
    s, t = (at_least_float32(logits).div(temperature).softmax(1) for logits in (student, teacher))
    m, s, t = (p.clamp(least, 1 - least) for p in ((s + t) / 2, s, t))
    return (0.5 * m * (2 * m.log() - s.log() - t.log())).mean()


def variance_within_classes(images: Tensor, classes: Tensor) -> Tensor:
    """Share of the images' variance that is between images of one class: 0 where each class is a single image.

    Both variances are unbiased estimates, so the share does not depend on how many images a class has. It is 1
    where no class has two images, since then nothing is known.

    Args:
        images: `(batch, ...)`.
        classes: `(batch,)`.
    """
    rows = at_least_float32(images).flatten(1)
    belongs = F.one_hot(classes).to(rows)
    counts = belongs.sum(0)
    free = len(rows) - (counts > 0).sum()
    if free < 1:
        return rows.new_ones(())
    centres = belongs.T @ rows / counts.clamp(min=1)[:, None]
    within = (rows - centres[classes]).square().sum() / free
    total = (rows - rows.mean(0)).square().sum() / (len(rows) - 1)
    return within / total.clamp(min=torch.finfo(rows.dtype).tiny)


def category_contrast(features: Tensor, positives: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE in which a sample has several positives, whose sum is inside the logarithm; one value per anchor.

    (The supervised contrast of CAE-DFKD, arXiv:2504.21478.) Anchors are the samples that have a positive.

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

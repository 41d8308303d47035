"""What teaches a generator that sees no data: statistics, balance and disagreement of a frozen teacher's answers.

All of it couples the samples of a batch, except :func:`agreeing_divergence`, which has one value per sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


def class_imbalance(logits: Tensor) -> Tensor:
    """Sum over classes of p log10 p, for the mean p of the samples' class probabilities: -log10(classes) at its least.

    (DAFL: Chen et al., ICCV 2019, arXiv:1904.01186.)

    Args:
        logits: `(batch, classes)`.
    """
    p = at_least_float32(logits).softmax(1).mean(0)
    return (p * p.clamp(min=torch.finfo(p.dtype).tiny).log10()).sum()


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


def classes_told_apart(logits: Tensor) -> Tensor:
    """exp(H(mean p) - mean H(p)): how many classes the answers to a batch tell apart, from 1 to their number.

    It is 1 where every sample gets the same answer, however sure; the inception score where the teacher is
    Inception (Salimans et al., NeurIPS 2016, arXiv:1606.03498).

    Args:
        logits: `(batch, classes)`.
    """
    log_p = at_least_float32(logits).log_softmax(1)
    mean = log_p.logsumexp(0) - torch.tensor(float(len(log_p))).log().to(log_p)
    return ((log_p.exp() * (log_p - mean)).sum(1)).mean().exp()


def variance_within_classes(images: Tensor, classes: Tensor) -> Tensor:
    """Share of the images' variance that is between images of one class: 0 where each class is a single image.

    Both variances are unbiased estimates, so the share does not depend on how many images a class has. It is 1
    where no class has two images, since then nothing is known.

    Args:
        images: `(batch, ...)`.
        classes: `(batch,)`.
    """
    rows = at_least_float32(images).flatten(1)
    belongs = torch.nn.functional.one_hot(classes).to(rows)
    counts = belongs.sum(0)
    free = len(rows) - (counts > 0).sum()
    if free < 1:
        return rows.new_ones(())
    centres = belongs.T @ rows / counts.clamp(min=1)[:, None]
    within = (rows - centres[classes]).square().sum() / free
    total = (rows - rows.mean(0)).square().sum() / (len(rows) - 1)
    return within / total.clamp(min=torch.finfo(rows.dtype).tiny)

"""Class prototypes and anchors: means of classes, where samples may belong to a class in part, and nearness to them.

Weights `(samples, classes)` say how much a sample counts for a class: one-hot rows for labelled samples,
probabilities for others. What couples samples is a scalar, to be wrapped as `Term(value)`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from transfuse.losses._inputs import at_least_float32
from transfuse.losses.information import entropy
from transfuse.losses.reduction import IGNORE

SMALLEST = 1e-8
"""The least weight a class is divided by: one that nothing belongs to has its mean at the origin, not at NaN."""


def soft_labels(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """How much each sample belongs to each class: one-hot where it has a label, else the softmax of its logits.

    Args:
        logits: `(samples, classes)`; the gradient of soft rows flows to them.
        labels: `(samples,)` class indices, :data:`~transfuse.losses.reduction.IGNORE` where there is none; None for
            no labels at all.

    Returns:
        `(samples, classes)`, rows that add to 1.

    >>> soft_labels(torch.zeros(2, 2), torch.tensor([1, IGNORE]))
    tensor([[0.0000, 1.0000],
            [0.5000, 0.5000]])
    """
    soft = at_least_float32(logits).softmax(1)
    if labels is None:
        return soft
    known = labels != IGNORE
    hard = F.one_hot(labels.where(known, 0), logits.shape[1]).to(soft.dtype)
    return torch.where(known[:, None], hard, soft)


def class_means(features: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean feature of each class, `(classes, features)`.

        mean_k = sum_i weights[i, k] features[i] / sum_i weights[i, k]

    Args:
        features: `(samples, features)`.
        weights: `(samples, classes)`, not negative.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if features.dim() != 2 or weights.dim() != 2 or len(features) != len(weights):
        raise ValueError(
            "class means need features (samples, features) and weights (samples, classes) of the same samples, "
            f"found {tuple(features.shape)} and {tuple(weights.shape)}"
        )
    features, weights = at_least_float32(features), at_least_float32(weights)
    with torch.autocast(features.device.type, enabled=False):  # it would multiply in half precision
        return weights.mT @ features / weights.sum(0).clamp_min(SMALLEST)[:, None]


def anchor_entropy(features: Tensor, anchors: Tensor) -> Tensor:
    """How undecided samples are between anchors: the entropy of the softmax of their cosines, without a temperature.

    The visual-persistence loss of LFTL (Lyu et al., 2024, arXiv:2407.18899): it draws every sample towards few anchors.

    Args:
        features: `(samples, features)`.
        anchors: `(anchors, features)`. One at the origin has cosine 0 with everything.

    Returns:
        `(samples,)`, between 0 (also with a single anchor) and log(anchors).

    Raises:
        ValueError: the shapes do not belong together, or there is no anchor.
    """
    if features.dim() != 2 or anchors.dim() != 2 or features.shape[1] != anchors.shape[1] or not len(anchors):
        raise ValueError(
            "features must be (samples, features) and anchors (one at least, features), found "
            f"{tuple(features.shape)} and {tuple(anchors.shape)}"
        )
    rows, columns = F.normalize(at_least_float32(features)), F.normalize(at_least_float32(anchors))
    with torch.autocast(features.device.type, enabled=False):  # it would multiply in half precision
        return entropy(rows @ columns.mT)


def mean_alignment(source: Tensor, source_weights: Tensor, target: Tensor, target_weights: Tensor) -> Tensor:
    """Squared distance between the means of two domains, over all samples and class by class.

        ( ||mean(source) - mean(target)||^2 + sum_k ||mean_k(source) - mean_k(target)||^2 ) / (classes + 1)

    It is the squared maximum mean discrepancy with a linear kernel, marginal and conditional (KTF: Yao et al.,
    2025, arXiv:2502.13573).

    Args:
        source: `(samples, features)`; `source_weights` `(samples, classes)` say which class they belong to.
        target: `(other samples, features)`; `target_weights` `(other samples, classes)`.

    Returns:
        Scalar.

    Raises:
        ValueError: the two sides differ in features or classes, or the source has no sample of a class (checked on
            the CPU only).
    """
    if source.shape[1:] != target.shape[1:] or source_weights.shape[1:] != target_weights.shape[1:]:
        raise ValueError(
            f"source features {tuple(source.shape)} with weights {tuple(source_weights.shape)} and target features "
            f"{tuple(target.shape)} with weights {tuple(target_weights.shape)} must agree in features and in classes"
        )
    if source_weights.device.type == "cpu" and (source_weights.sum(0) <= 0).any():  # a GPU would make the host wait
        empty = (source_weights.sum(0) <= 0).nonzero().flatten().tolist()
        raise ValueError(f"the source has no sample of the classes {empty}, so there is nothing to align them with")
    by_class = class_means(source, source_weights) - class_means(target, target_weights)
    overall = at_least_float32(source).mean(0) - at_least_float32(target).mean(0)
    return (overall.square().sum() + by_class.square().sum()) / (len(by_class) + 1)

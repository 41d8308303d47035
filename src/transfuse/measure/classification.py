"""What a classifier gets right, sample by sample and class by class.

Per-sample values are what the paired bootstrap needs (:mod:`transfuse.measure.interval`). How far two
models agree is in :mod:`transfuse.measure.fidelity`, whether confidences can be believed in
:mod:`transfuse.measure.calibration`, and losses to train on are in :mod:`transfuse.losses`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from transfuse.measure.checks import check_labels, check_logits
from transfuse.measure.interval import paired


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where the most probable class is the label, else 0; the mean is the accuracy.

    Args:
        logits: `(samples, classes)`.
        labels: `(samples,)` integers in `[0, classes)`.

    Returns:
        `(samples,)` float.

    Raises:
        ShapeError: the logits are not `(samples, classes)`, or there is not one label per sample.
        InputError: a label is out of range, or a sample's logits are NaN or infinite.
    """
    logits = check_logits(logits)
    labels = check_labels(labels, *logits.shape)
    return (logits.argmax(dim=1) == labels).float()


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """`-log p(label)` in nats, `(samples,)`; arguments and errors as in :func:`correct`."""
    logits = check_logits(logits)
    labels = check_labels(labels, *logits.shape)
    return F.cross_entropy(logits.float(), labels, reduction="none")


def per_class_accuracy(correct: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Accuracy of every class, `(classes,)`; NaN for a class without samples.

    Args:
        correct: `(samples,)`, from :func:`correct`.
        labels: `(samples,)` integers in `[0, classes)`.
        classes: how many there are.

    Raises:
        ShapeError: there is not one label per sample.
        InputError: a label is out of range.
    """
    labels = check_labels(labels, len(correct), classes)
    hits = torch.zeros(classes, dtype=torch.float64, device=correct.device)
    return hits.index_add_(0, labels, correct.double()) / labels.bincount(minlength=classes)


def per_class_gain(values: Tensor, baseline: Tensor, labels: Tensor, classes: int) -> list[dict[str, int | float]]:
    """Mean of `values - baseline` within every class, with its 95 % paired bootstrap interval.

    Every interval stands alone: among many classes some exclude zero by chance, and the interval of a class
    with a handful of samples is too narrow, hence `count`.

    Args:
        values: `(seeds, samples)` of the method, for example :func:`correct` of every seed, stacked.
        baseline: `(seeds, samples)` of what it is compared with.
        labels: `(samples,)` integers in `[0, classes)`.
        classes: how many there are.

    Returns:
        `{"class", "gain", "low", "high", "count"}` for every class that has samples, in class order.

    Raises:
        ShapeError: `values` and `baseline` differ in shape, or there is not one label per sample.
        InputError: a label is out of range, or a value is not finite.
    """
    for side in (values, baseline):
        labels = check_labels(labels, side.shape[-1], classes)
    rows: list[dict[str, int | float]] = []
    for label in labels.unique().tolist():
        members = labels == label
        gain = paired(values[..., members], baseline[..., members])
        count = int(members.sum())
        rows.append({"class": label, "gain": gain.mean, "low": gain.low, "high": gain.high, "count": count})
    return rows

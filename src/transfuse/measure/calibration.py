"""Whether a classifier is right as often as it is confident.

Accuracy alone is in :mod:`transfuse.measure.classification`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transfuse.core.errors import InputError
from transfuse.measure.checks import check_labels, check_logits
from transfuse.measure.classification import correct


@dataclass(frozen=True, slots=True)
class Reliability:
    """A reliability diagram: samples put into bins by the probability of the predicted class.

    Args:
        confidence: `(bins,)` mean probability of the predicted class; NaN where the bin is empty.
        accuracy: `(bins,)` share of correct predictions; NaN where the bin is empty.
        count: `(bins,)` int64, samples in the bin.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    """Confidence and accuracy in bins of equal width over `(0, 1]`, each with its right edge.

    Args:
        logits: `(samples, classes)`.
        labels: `(samples,)` integers in `[0, classes)`.
        bins: how many.

    Raises:
        ShapeError: the logits are not `(samples, classes)`, or there is not one label per sample.
        InputError: a label is out of range, a sample's logits are NaN or infinite, or `bins` is below 1.
    """
    if bins < 1:
        raise InputError(f"a reliability diagram needs at least 1 bin, found {bins}")
    right = correct(logits, labels).double()
    confidence = logits.detach().double().softmax(dim=1).amax(dim=1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=logits.device)
    # Between the inner edges only, so that rounding cannot put a sample outside the outer ones.
    place = torch.bucketize(confidence, edges[1:-1])
    count = place.bincount(minlength=bins)
    empty = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    return Reliability(
        confidence=empty.index_add(0, place, confidence) / count,
        accuracy=empty.index_add(0, place, right) / count,
        count=count,
    )


def brier_score(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared distance between the probabilities and the truth, summed over classes (Brier, 1950): from 0, sure and
    right, to 2, sure and wrong.

    Returns:
        `(samples,)` float; arguments and errors as in :func:`transfuse.measure.correct`.
    """
    labels = check_labels(labels, *check_logits(logits).shape)
    truth = torch.nn.functional.one_hot(labels, logits.shape[1])
    return (logits.detach().double().softmax(dim=1) - truth).square().sum(dim=1).float()


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over the bins (Guo et al., 2017, arXiv:1706.04599).

    Bins weigh what they hold. Arguments and errors as in :func:`reliability`; also

    Raises:
        InputError: there are no samples.
    """
    diagram = reliability(logits, labels, bins)
    samples = int(diagram.count.sum())
    if samples == 0:
        raise InputError("expected at least one sample, found logits and labels of none")
    gap = (diagram.confidence - diagram.accuracy).abs().nan_to_num()
    return float((gap * diagram.count).sum() / samples)

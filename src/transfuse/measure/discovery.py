"""How well classes that nobody labelled were found: clusters are matched with them first."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.core.errors import InputError, MissingExtraError, ShapeError


def matched(predictions: Tensor, labels: Tensor, known: int) -> Tensor:
    """Whether each sample is recognised, known classes by their number and novel ones by the best matching.

    Predictions below `known` say a known class; the others say a cluster. Clusters are matched one to one with the
    novel classes so that as many samples as possible agree (Hungarian method). A novel sample that is called known
    is wrong, and so is a known one that is called novel.

    Args:
        predictions, labels: `(samples,)` integers; labels from `known` on are novel classes.
        known: number of known classes; 0 matches everything.

    Returns:
        `(samples,)` bool.

    Raises:
        ShapeError: not one prediction per label.
        InputError: a label or prediction is negative.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MissingExtraError("scipy", "data", "matching clusters with classes") from error
    if predictions.shape != labels.shape or labels.dim() != 1:
        raise ShapeError(f"one prediction per label is needed, found {tuple(predictions.shape)}, {tuple(labels.shape)}")
    if len(labels) and int(torch.minimum(predictions, labels).min()) < 0:
        raise InputError("labels and predictions must be class numbers from 0 on")
    novel = (labels >= known) & (predictions >= known)
    right = (labels < known) & (predictions == labels)
    if novel.any():
        truth, cluster = labels[novel] - known, predictions[novel] - known
        size = int(torch.maximum(truth.max(), cluster.max())) + 1
        table = torch.bincount(cluster * size + truth, minlength=size * size).view(size, size)
        rows, columns = linear_sum_assignment(table.cpu().numpy(), maximize=True)
        matching = torch.empty(size, dtype=labels.dtype, device=labels.device)
        matching[torch.as_tensor(rows, device=labels.device)] = torch.as_tensor(columns, device=labels.device)
        right[novel] = matching[cluster] == truth
    return right

"""Losses against labels.

One value per label; sums, masks and averages are in :mod:`transfuse.losses.reduction`, losses against a
teacher's distribution in :mod:`transfuse.losses.divergence`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from transfuse.losses._inputs import at_least_float32
from transfuse.losses.reduction import IGNORE, classes_last


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each label, 0 where the label is :data:`~transfuse.losses.reduction.IGNORE`.

    Args:
        logits: `(batch, classes)`, `(batch, tokens, vocabulary)` or `(batch, classes, height, width)`.
        labels: class indices, of any integer type: `(batch,)`, `(batch, tokens)` or `(batch, height, width)`.
        label_smoothing: share of the target, in [0, 1], that is spread evenly over all classes.

    Returns:
        Values in the shape of `labels`, in float32 at least.

    Raises:
        ValueError: the shapes do not belong together, labels are no integers, or one is out of range. The range is
            checked on the CPU only: on a GPU it would make the host wait for the device.

    >>> import torch
    >>> cross_entropy(torch.zeros(3, 2), torch.tensor([0, 1, IGNORE]))
    tensor([0.6931, 0.6931, 0.0000])
    """
    scores = at_least_float32(classes_last(logits))
    require_labels(labels, scores.shape)
    labels = labels.long()
    values = F.cross_entropy(
        scores.flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORE,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    return values.view_as(labels)


def pseudo_labels(logits: Tensor, threshold: float) -> Tensor:
    """The predicted class of every row, :data:`~transfuse.losses.reduction.IGNORE` where its probability is not above
    the threshold (FixMatch: Sohn et al., NeurIPS 2020, arXiv:2001.07685). No gradient passes.

    Args:
        logits: as in :func:`cross_entropy`.

    >>> import torch
    >>> pseudo_labels(torch.tensor([[5.0, 0.0], [0.0, 1.0]]), 0.9)
    tensor([   0, -100])
    """
    confidence, labels = at_least_float32(classes_last(logits.detach())).softmax(-1).max(-1)
    return labels.masked_fill(~(confidence > threshold), IGNORE)


def ctc(logits: Tensor, labels: Tensor, frames: Tensor | None = None) -> Tensor:
    """-log of the probability of all alignments of a transcript with the frames (CTC), `(batch,)`.

    (Graves et al., ICML 2006.) Class 0 is the blank.

    Args:
        logits: `(batch, frames, classes)`.
        labels: `(batch, tokens)` classes from 1 on, padded with :data:`~transfuse.losses.reduction.IGNORE`.
        frames: `(batch,)` how many frames of each sample count; None counts all.

    Raises:
        ValueError: the shapes do not belong together; a transcript is empty, has a blank or an unknown class, or needs
            more frames than there are.
    """
    if logits.dim() != 3 or labels.dim() != 2 or len(labels) != len(logits):
        raise ValueError(
            f"CTC needs logits (batch, frames, classes) and labels (batch, tokens), found {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    real = labels != IGNORE
    lengths = real.sum(1)
    if not bool((lengths > 0).all()):
        raise ValueError("a transcript is empty: leave its sample out")
    used = labels[real]
    if int(used.min()) < 1 or int(used.max()) >= logits.shape[2]:
        raise ValueError(f"transcripts need classes in 1..{logits.shape[2] - 1}, for 0 is the blank")
    if frames is None:
        frames = lengths.new_full(lengths.shape, logits.shape[1])
    repeats = ((labels[:, 1:] == labels[:, :-1]) & real[:, 1:]).sum(1)  # between equal ones there must be a blank
    if bool((lengths + repeats > frames).any()):
        raise ValueError("a transcript needs more frames than its sample has: leave it out, or keep more frames")
    log_probs = at_least_float32(logits).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log_probs, labels.clamp(min=0).long(), frames, lengths, reduction="none")


def require_labels(labels: Tensor, shape: Sequence[int]) -> None:
    """Check that labels are class indices for logits of this shape, classes last.

    Raises:
        ValueError: as :func:`cross_entropy`.
    """
    if labels.shape != tuple(shape[:-1]):
        raise ValueError(
            f"logits of shape {tuple(shape)} need labels of shape {tuple(shape[:-1])}, "
            f"found {tuple(labels.shape)}: give one class index per row of logits"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be integers, class indices, found {labels.dtype}: use labels.long()")
    if labels.device.type == "cpu":
        _require_in_range(labels, shape[-1])


def _require_in_range(labels: Tensor, classes: int) -> None:
    used = labels[labels != IGNORE]
    if used.numel() == 0:
        return
    low, high = (int(end) for end in used.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels must lie in 0..{classes - 1} for {classes} classes, found {low}..{high}: give the model "
            f"more classes, renumber the labels, or mark those without a class as {IGNORE}"
        )

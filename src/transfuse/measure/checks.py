"""What the measures ask of logits and labels, so that a number is never computed from the wrong thing."""

from __future__ import annotations

from torch import Tensor

from transfuse.core.errors import InputError, ShapeError, VocabularyError


def check_logits(logits: Tensor) -> Tensor:
    """The logits, detached, after checking that they are `(samples, classes)` and define probabilities.

    Raises:
        ShapeError: not two dimensions.
        InputError: a sample's largest logit is NaN or infinite (single classes may be `-inf`: ruled out).
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ShapeError(
            f"expected logits of shape (samples, classes), found {tuple(logits.shape)}: "
            "flatten tokens or pixels into samples first"
        )
    bad = int((~logits.amax(dim=1).isfinite()).sum())
    if bad:
        raise InputError(f"{bad} of {len(logits)} samples have NaN or infinite logits: find out why before measuring")
    return logits.detach()


def check_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits, detached, after checking that they belong to the same samples and classes.

    Raises:
        ShapeError: different numbers of samples; as in :func:`check_logits`.
        VocabularyError: different numbers of classes.
        InputError: as in :func:`check_logits`.
    """
    student, teacher = check_logits(student), check_logits(teacher)
    if len(student) != len(teacher):
        raise ShapeError(
            f"the student has logits for {len(student)} samples, the teacher for {len(teacher)}: "
            "run both on the same samples"
        )
    if student.shape[1] != teacher.shape[1]:
        raise VocabularyError(
            f"the student has {student.shape[1]} classes, the teacher {teacher.shape[1]}: "
            "select the shared classes on both sides, in the same order"
        )
    return student, teacher


def check_labels(labels: Tensor, samples: int, classes: int) -> Tensor:
    """The labels as `(samples,)` int64, after checking that they lie in `[0, classes)`.

    Raises:
        ShapeError: not one label per sample.
        InputError: not integers, or out of range.
    """
    if labels.shape != (samples,):
        raise ShapeError(
            f"expected one label for each of {samples} samples, found labels of shape {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise InputError(f"expected integer labels, found {labels.dtype}: pass class indices")
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise InputError(
            f"labels must lie in [0, {classes}), found {outside.unique().tolist()[:5]} "
            f"in {len(outside)} samples: leave unlabelled samples out, and check the number of classes"
        )
    return labels.long()

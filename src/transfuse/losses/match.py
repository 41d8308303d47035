"""One entrance to the divergences between a student and whatever is known of a teacher.

:class:`Divergence` says which, :func:`match` takes it of logits, of what was kept of them, or of logits that have not
been computed: then the values and their gradients come from :mod:`transfuse.losses.fused`, which never builds
`(tokens, vocabulary)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from transfuse.losses.divergence import (
    jensen_shannon,
    kl_divergence,
    skew_kl,
    soft_cross_entropy,
    total_variation,
)
from transfuse.losses.fused import fused
from transfuse.losses.reduction import IGNORE
from transfuse.losses.scores import Projection, Sampled, Scores, Target, TopK
from transfuse.losses.sparse import sampled_kl, top_k_kl
from transfuse.losses.supervised import cross_entropy

Kind = Literal["forward", "reverse", "skew", "skew_reverse", "jensen_shannon", "interpolated", "total_variation"]
SHARED = ("skew", "skew_reverse", "jensen_shannon", "interpolated")


@dataclass(frozen=True)
class Divergence:
    """Which divergence, as a value that methods pass around.

    Args:
        kind: `"forward"` KL(teacher || student), `"reverse"` KL(student || teacher), `"skew"` and `"skew_reverse"`
            (:func:`~transfuse.losses.skew_kl`), `"jensen_shannon"`, `"interpolated"` (soft cross-entropy to the
            distribution whose logits are `(1 - share) * student + share * teacher`, the student's part a constant:
            TAID), `"total_variation"`.
        share: the skew, beta or position; only those kinds have one.
        temperature: divides the logits of both sides.
        temperature_squared: multiply the value by its square.

    Raises:
        ValueError: unknown kind; a share where there is none, or outside its range; temperature not positive.
    """

    kind: Kind = "forward"
    share: float | None = None
    temperature: float = 1.0
    temperature_squared: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"unknown divergence {self.kind!r}: known are {', '.join(get_args(Kind))}")
        if (self.share is not None) != (self.kind in SHARED):
            raise ValueError(
                f"the divergence {self.kind!r} {'needs a share' if self.kind in SHARED else 'has no share'}, "
                f"found share={self.share}"
            )
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be positive and finite, found {self.temperature}")
        share = 0.5 if self.share is None else self.share
        if self.kind == "jensen_shannon" and not 0 < share < 1:
            raise ValueError(
                f"beta must lie strictly between 0 and 1, found {share}: the divergence is zero at both ends. What TRL "
                'gives there are the divergences "forward" (beta 0) and "reverse" (beta 1)'
            )
        if self.kind in ("skew", "skew_reverse") and not 0 <= share < 1:
            raise ValueError(f"skew must lie in [0, 1), found {share}: at 1 a distribution is compared with itself")
        if not 0 <= share <= 1:
            raise ValueError(f"the position between student (0) and teacher (1) must lie in [0, 1], found {share}")

    def __call__(self, student: Tensor, teacher: Tensor | TopK | Sampled) -> Tensor:
        """The divergence of each row of logits, `(...)`."""
        self.require(teacher)
        if isinstance(teacher, TopK | Sampled):
            values = top_k_kl(student, teacher) if isinstance(teacher, TopK) else sampled_kl(student, teacher)
            return values * self.temperature**2 if self.temperature_squared else values
        given: Any = {"temperature": self.temperature, "temperature_squared": self.temperature_squared}
        share = self.share or 0.0
        match self.kind:
            case "forward":
                return kl_divergence(student, teacher, **given)
            case "reverse":
                return kl_divergence(student, teacher, direction="student_to_teacher", **given)
            case "skew":
                return skew_kl(student, teacher, skew=share, **given)
            case "skew_reverse":
                return skew_kl(student, teacher, skew=share, direction="student_to_teacher", **given)
            case "jensen_shannon":
                return jensen_shannon(student, teacher, beta=share, **given)
            case "interpolated":
                return soft_cross_entropy(student, _between(student.detach(), teacher, share), **given)
            case "total_variation":
                return total_variation(student, teacher, **given)

    def require(self, target: Target) -> None:
        """Check that so much is known of a teacher.

        Raises:
            ValueError: a part of its distribution was kept, and this divergence needs all, or another temperature.
        """
        if not isinstance(target, TopK | Sampled):
            return
        if self.kind != "forward":
            raise ValueError(
                f"the divergence {self.kind!r} needs the teacher's whole distribution, and this source gives "
                f"{type(target).__name__}: use a forward divergence (KD, RSKD), or a source with full logits"
            )
        if target.temperature != self.temperature:
            raise ValueError(
                f"the targets were kept at temperature {target.temperature}, asked for {self.temperature}: what was "
                "left out cannot be softened afterwards; use the one they were kept at, or keep them anew"
            )


def match(
    student: Scores,
    target: Target,
    divergence: Divergence,
    *,
    labels: Tensor | None = None,
    rows: Tensor | None = None,
    expect: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor, Tensor | None]:
    """Divergence from a target and cross-entropy of labels, one value per row.

    Args:
        student: logits `(..., classes)` or a :class:`Projection`.
        target: the teacher's, with the same rows.
        labels: `(...)` class numbers; None for no cross-entropy; -100 is "no label".
        rows: `(...)` boolean; where false, value and gradient are 0, and nothing is computed that need not be.
        expect: the relative weights that divergence and cross-entropy will have in the loss. Only speed depends on
            it: gradients are formed for them ahead, and once more should others arrive.

    Returns:
        Values `(...)` of the divergence, and of the cross-entropy where labels were given.

    Raises:
        ValueError: shapes or temperatures do not fit, or a sparse target where a whole distribution is needed.
    """
    divergence.require(target)
    if isinstance(student, Projection):
        if not _learns(target):
            found = fused(student, target, divergence, labels=labels, rows=rows, expect=expect)
            return found[0], None if labels is None else found[1]
        student = student.dense()
    if isinstance(target, Projection):
        target = target.dense()
    values = divergence(student, target)
    entropy = None if labels is None else cross_entropy(student, labels)
    if rows is not None:
        values = torch.where(rows, values, 0)
        entropy = None if entropy is None else torch.where(rows, entropy, 0)
    return values, entropy


def label_entropy(student: Scores, labels: Tensor) -> Tensor:
    """Cross-entropy of each label, `(...)`; 0 where it is -100, and nothing is computed there that need not be.

    Raises:
        ValueError: as :func:`~transfuse.losses.cross_entropy`.
    """
    if isinstance(student, Projection):
        return fused(student, None, None, labels=labels, rows=labels != IGNORE)[1]
    return cross_entropy(student, labels)


def _between(student: Tensor, teacher: Tensor, share: float) -> Tensor:
    """Logits at a share of the way to the teacher's; what one side excludes stays excluded."""
    excluded = (student == -math.inf) | (teacher == -math.inf)
    return torch.lerp(student, teacher.to(student.dtype), share).masked_fill(excluded, -math.inf)


def _learns(target: Target) -> bool:
    """Whether gradients must reach the teacher as well, as in networks that learn from each other."""
    if isinstance(target, Projection):
        return torch.is_grad_enabled() and (target.hidden.requires_grad or target.weight.requires_grad)
    return isinstance(target, Tensor) and target.requires_grad

"""Divergences between the distributions of a student and a teacher over the same classes.

All take *logits* of equal shape, `(batch, classes)`, `(batch, tokens, vocabulary)` or
`(batch, classes, height, width)`, and give one value per row: `(batch,)`, `(batch, tokens)` or
`(batch, height, width)`, computed in float32 at least. Masks and averages come afterwards, in
:mod:`transfuse.losses.reduction`; losses against labels are in :mod:`transfuse.losses.supervised`.

- **Temperature.** Logits are divided by it, and the value is multiplied by its square, so that the size of
  the gradient hardly depends on it (Hinton et al., 2015, arXiv:1503.02531). `temperature_squared=False`
  leaves the square out.
- **Gradients** flow to both sides. Run the teacher without gradients, or detach it, if it shall not learn.
- **Impossible classes** (logit -inf) contribute nothing to the side that excludes them. A divergence is inf
  where one side excludes a class that the other insists on; such a row has gradient zero, so that masking it
  later is safe. A row excluded everywhere on both sides has value and gradient zero.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from transfuse.losses._inputs import at_least_float32, require_same_shape
from transfuse.losses.information import entropy
from transfuse.losses.reduction import classes_last

Direction = Literal["teacher_to_student", "student_to_teacher"]
"""`teacher_to_student` is KL(teacher || student), `student_to_teacher` is KL(student || teacher)."""


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    direction: Direction = "teacher_to_student",
    temperature: float = 1.0,
    temperature_squared: bool = True,
) -> Tensor:
    """Kullback-Leibler divergence of each row.

    `teacher_to_student`, KL(teacher || student), is called forward: the student must cover everything the
    teacher finds likely. `student_to_teacher`, KL(student || teacher), is called reverse: the student may
    settle on a part of what the teacher finds likely.

    Args:
        student: logits, in one of the three shapes of this module.
        teacher: logits of the same shape.
        direction: which side the expectation is taken over.
        temperature: divides both logits.
        temperature_squared: multiply the value by the square of the temperature.

    Raises:
        ValueError: shapes differ or are none of the three, the temperature is not positive, or the direction
            is unknown.

    >>> teacher = torch.tensor([[0.0, 0.0]])
    >>> student = torch.tensor([[0.0, math.log(3)]])
    >>> kl_divergence(student, teacher)  # 1/2 log(4/2) + 1/2 log(4/6)
    tensor([0.1438])
    >>> kl_divergence(student, teacher, direction="student_to_teacher")  # 1/4 log(2/4) + 3/4 log(6/4)
    tensor([0.1308])
    """
    return skew_kl(
        student,
        teacher,
        skew=0.0,
        direction=direction,
        temperature=temperature,
        temperature_squared=temperature_squared,
    )


def skew_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    skew: float = 0.1,
    direction: Direction = "teacher_to_student",
    temperature: float = 1.0,
    temperature_squared: bool = True,
) -> Tensor:
    """KL divergence to a mixture, which bounds it (DistiLLM: Ko et al., 2024, arXiv:2402.03898).

    `teacher_to_student` is KL(teacher || skew * teacher + (1 - skew) * student), the paper's skew KL;
    `student_to_teacher` is KL(student || skew * student + (1 - skew) * teacher), its skew reverse KL.
    Neither exceeds -log(skew). With a skew of 0 they are :func:`kl_divergence`.

    Args:
        student: logits, in one of the three shapes of this module.
        teacher: logits of the same shape.
        skew: share, in [0, 1), that the side the expectation is taken over has in the mixture.
        direction: which side the expectation is taken over.
        temperature: divides both logits.
        temperature_squared: multiply the value by the square of the temperature.

    Raises:
        ValueError: as in :func:`kl_divergence`, or the skew is outside [0, 1).
    """
    if not 0 <= skew < 1:
        raise ValueError(f"skew must lie in [0, 1), found {skew}: at 1 a distribution is compared with itself")
    log_s, log_t = _log_probabilities(student, teacher, temperature)
    if direction == "teacher_to_student":
        value = _kl_to_mixture(log_t, log_s, skew)
    elif direction == "student_to_teacher":
        value = _kl_to_mixture(log_s, log_t, skew)
    else:
        raise ValueError(
            f'direction must be "teacher_to_student", KL(teacher || student), or "student_to_teacher", '
            f"KL(student || teacher); found {direction!r}"
        )
    return value * temperature**2 if temperature_squared else value


def jensen_shannon(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    temperature_squared: bool = True,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of each row (in GKD: Agarwal et al., 2024, arXiv:2306.13649).

    It is beta * KL(teacher || m) + (1 - beta) * KL(student || m) with the mixture
    m = beta * teacher + (1 - beta) * student. It is bounded, continuous in beta, and tends to zero at *both*
    ends: like beta * KL(teacher || student) near 0, like (1 - beta) * KL(student || teacher) near 1. TRL
    returns the unscaled KLs at beta 0 and 1, so its loss jumps there; here the ends are refused.

    Args:
        student: logits, in one of the three shapes of this module.
        teacher: logits of the same shape.
        beta: share of the teacher in the mixture, strictly between 0 and 1.
        temperature: divides both logits.
        temperature_squared: multiply the value by the square of the temperature.

    Raises:
        ValueError: shapes differ or are none of the three, the temperature is not positive, or beta is not
            strictly between 0 and 1.

    >>> certain_and_opposite = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    >>> jensen_shannon(*certain_and_opposite)  # the greatest value there is, log(2)
    tensor([0.6931])
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"beta must lie strictly between 0 and 1, found {beta}: the divergence is zero at both ends. For "
            f'what TRL does there, call kl_divergence(direction="teacher_to_student") instead of beta 0, '
            f'kl_divergence(direction="student_to_teacher") instead of beta 1'
        )
    log_s, log_t = _log_probabilities(student, teacher, temperature)
    value = beta * _kl_to_mixture(log_t, log_s, beta) + (1 - beta) * _kl_to_mixture(log_s, log_t, 1 - beta)
    return value * temperature**2 if temperature_squared else value


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, temperature_squared: bool = True
) -> Tensor:
    """Cross-entropy -sum(teacher * log student) of each row.

    It has the student gradient of KL(teacher || student), but its least value is the teacher's entropy.

    Args:
        student: logits, in one of the three shapes of this module.
        teacher: logits of the same shape.
        temperature: divides both logits.
        temperature_squared: multiply the value by the square of the temperature.

    Raises:
        ValueError: shapes differ or are none of the three, or the temperature is not positive.
    """
    log_s, log_t = _log_probabilities(student, teacher, temperature)
    t = log_t.exp()
    value = _expectation(t, torch.where(t > 0, -log_s, 0.0))
    return value * temperature**2 if temperature_squared else value


def balanced_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    nu: float = 2.0,
    smooth: float | None = None,
    temperature: float = 1.0,
    temperature_squared: bool = True,
) -> Tensor:
    """Both KL divergences, balanced by which side is surer (BD-KD: Amara et al., 2022, arXiv:2212.12965).

    With the entropy gap h = H(teacher) - H(student), the value is w_f * KL(teacher || student) +
    w_r * KL(student || teacher). Where the student is surer than the teacher (h > 0) w_f is `nu` and w_r is 1,
    where it is less sure the other way round, at h = 0 both are 1. No gradient flows through h.

    Args:
        student: logits, in one of the three shapes of this module.
        teacher: logits of the same shape.
        nu: 1 or more; at 1 the value is the Jeffreys divergence.
        smooth: a width s replaces the step by w_f = 1 + (nu - 1) * sigmoid(h / s), w_r by the same of -h.
        temperature: divides both logits, also for the entropies.
        temperature_squared: multiply the value by the square of the temperature.

    Raises:
        ValueError: as in :func:`kl_divergence`, nu is below 1, or the width is not positive.
    """
    if not nu >= 1:
        raise ValueError(f"nu must be 1 (no balance) or more, found {nu}")
    if smooth is not None and not smooth > 0:
        raise ValueError(f"smooth must be positive, found {smooth}: None is a step")
    log_s, log_t = _log_probabilities(student, teacher, temperature)
    gap = (entropy(teacher / temperature) - entropy(student / temperature)).detach()
    if smooth is None:
        surer, less_sure = (gap > 0).to(gap.dtype), (gap < 0).to(gap.dtype)
    else:
        surer, less_sure = torch.sigmoid(gap / smooth), torch.sigmoid(-gap / smooth)
    forward, reverse = _kl_to_mixture(log_t, log_s, 0.0), _kl_to_mixture(log_s, log_t, 0.0)
    value = (1 + (nu - 1) * surer) * forward + (1 + (nu - 1) * less_sure) * reverse
    return value * temperature**2 if temperature_squared else value


def total_variation(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, temperature_squared: bool = True
) -> Tensor:
    """Total variation distance of each row, half the sum of absolute differences, in [0, 1].

    Args:
        student: logits, in one of the three shapes of this module.
        teacher: logits of the same shape.
        temperature: divides both logits.
        temperature_squared: multiply the value by the square of the temperature.

    Raises:
        ValueError: shapes differ or are none of the three, or the temperature is not positive.
    """
    log_s, log_t = _log_probabilities(student, teacher, temperature)
    value = 0.5 * (log_s.exp() - log_t.exp()).abs().sum(-1)
    return value * temperature**2 if temperature_squared else value


def _log_probabilities(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    require_same_shape(student, teacher)
    if student.dim() not in (2, 3, 4):
        raise ValueError(
            f"found logits of shape {tuple(student.shape)}: reshape them to (batch, classes), "
            f"(batch, tokens, vocabulary) or (batch, classes, height, width)"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, found {temperature}: 1 leaves the logits as they are")
    return _log_softmax(student, temperature), _log_softmax(teacher, temperature)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities, classes last; rows of -inf stay -inf and receive no gradient instead of NaN."""
    logits = at_least_float32(classes_last(logits)) / temperature
    empty = logits.amax(-1, keepdim=True) == -math.inf
    return logits.masked_fill(empty, 0.0).log_softmax(-1).masked_fill(empty, -math.inf)


def _kl_to_mixture(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """KL(p || skew * p + (1 - skew) * q) of each row."""
    p = log_p.exp()
    log_ratio = torch.where(p > 0, log_p - log_q, 0.0)  # 0 log 0 = 0
    if skew > 0:  # p / mixture = 1 / (skew + (1 - skew) q / p)
        log_skew = log_ratio.new_full((), math.log(skew))
        log_ratio = -torch.logaddexp(log_skew, math.log1p(-skew) - log_ratio)
    value = _expectation(p, log_ratio)
    return value - value.detach().clamp(max=0)  # rounding may end below zero; the gradient is right even then


def _expectation(p: Tensor, values: Tensor) -> Tensor:
    """Sum of p * values of each row; a row with an infinite value is inf, with gradient 0 instead of NaN."""
    infinite = values.isinf()
    return (p * values.masked_fill(infinite, 0.0)).sum(-1).masked_fill(infinite.any(-1), math.inf)

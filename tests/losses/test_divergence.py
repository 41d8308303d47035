from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from transfuse.losses import Term, jensen_shannon, kl_divergence, skew_kl, soft_cross_entropy

Loss = Callable[..., Tensor]
SHAPES = [(3, 5), (2, 3, 5), (2, 5, 2, 3)]
HALF_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]
DIVERGENCES: dict[str, Loss] = {
    "kl_teacher_to_student": kl_divergence,
    "kl_student_to_teacher": partial(kl_divergence, direction="student_to_teacher"),
    "jensen_shannon": partial(jensen_shannon, beta=0.3),
    "skew_teacher_to_student": skew_kl,
    "skew_student_to_teacher": partial(skew_kl, direction="student_to_teacher"),
}
LOSSES = DIVERGENCES | {"soft_cross_entropy": soft_cross_entropy}

every_loss = pytest.mark.parametrize("name", LOSSES)
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def softmax(logits: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp(z / temperature) for z in logits]
    return [e / sum(exponentials) for e in exponentials]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mixed(share: float, p: list[float], q: list[float]) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


FORMULAS: dict[str, Callable[[list[float], list[float]], float]] = {
    "kl_teacher_to_student": lambda s, t: kl(t, s),
    "kl_student_to_teacher": lambda s, t: kl(s, t),
    "jensen_shannon": lambda s, t: 0.3 * kl(t, mixed(0.3, t, s)) + 0.7 * kl(s, mixed(0.3, t, s)),
    "skew_teacher_to_student": lambda s, t: kl(t, mixed(0.1, t, s)),
    "skew_student_to_teacher": lambda s, t: kl(s, mixed(0.1, s, t)),
    "soft_cross_entropy": lambda s, t: -sum(b * math.log(a) for a, b in zip(s, t, strict=True)),
}


def pair(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * student).to(dtype), (2 * teacher).to(dtype)


def gradient(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    student = student.detach().requires_grad_()
    return torch.autograd.grad(loss(student, teacher).sum(), student)[0]


# Value


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@every_loss
def test_equals_a_loop_written_from_the_formula(name: str, temperature: float, shape: tuple[int, ...]) -> None:
    student, teacher = pair(*shape, dtype=torch.float64)
    value = LOSSES[name](student, teacher, temperature=temperature)

    class_axis = 1 if len(shape) == 4 else len(shape) - 1
    rows = [axis for axis in range(len(shape)) if axis != class_axis]
    assert value.shape == tuple(shape[axis] for axis in rows)
    for position in itertools.product(*(range(shape[axis]) for axis in rows)):
        index: list[int | slice] = list(position)
        index.insert(class_axis, slice(None))
        s, t = (softmax(side[tuple(index)].tolist(), temperature) for side in (student, teacher))
        assert value[position].item() == pytest.approx(temperature**2 * FORMULAS[name](s, t), rel=1e-12)


@every_loss
def test_matches_float64_in_every_input_precision(name: str) -> None:
    for dtype in HALF_AND_FULL:
        student, teacher = pair(4, 1000, dtype=dtype)
        value = LOSSES[name](student, teacher)
        assert value.dtype == torch.float32
        torch.testing.assert_close(
            value.double(), LOSSES[name](student.double(), teacher.double()), rtol=1e-5, atol=1e-6
        )


@every_loss
def test_autocast_does_not_lower_the_precision(name: str) -> None:
    student, teacher = pair(4, 1000, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = LOSSES[name](student, teacher)
    torch.testing.assert_close(inside, LOSSES[name](student, teacher), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [*HALF_AND_FULL, torch.float64])
@every_divergence
def test_is_zero_when_student_equals_teacher_with_a_large_vocabulary(name: str, dtype: torch.dtype) -> None:
    logits = 5 * torch.randn(4, 32_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert DIVERGENCES[name](logits, logits).abs().max() <= 1e-6
    # Two float32 softmaxes differ by rounding, how much depends on the processor.
    assert gradient(DIVERGENCES[name], logits, logits).abs().max() <= 3e-6


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-5, 1e-3, 1.0, 100.0])
@every_divergence
def test_is_never_negative(name: str, noise: float) -> None:
    teacher, direction = pair(500, 200)
    for dtype in HALF_AND_FULL:
        student = teacher + noise * direction
        assert DIVERGENCES[name](student.to(dtype), teacher.to(dtype)).min() >= 0


@every_divergence
def test_gradient_near_the_optimum_is_exact_to_a_percent(name: str) -> None:
    teacher, direction = pair(2, 32_000, dtype=torch.bfloat16)
    student = (teacher.float() + 0.01 * direction.float()).to(torch.float32)
    exact = gradient(DIVERGENCES[name], student.double(), teacher.double())
    assert (gradient(DIVERGENCES[name], student, teacher).double() - exact).norm() < 0.01 * exact.norm()


def test_soft_cross_entropy_is_the_forward_kl_plus_the_entropy_of_the_teacher() -> None:
    student, teacher = pair(3, 5, dtype=torch.float64)
    entropy = soft_cross_entropy(teacher, teacher)
    torch.testing.assert_close(soft_cross_entropy(student, teacher), kl_divergence(student, teacher) + entropy)
    torch.testing.assert_close(
        gradient(soft_cross_entropy, student, teacher), gradient(kl_divergence, student, teacher)
    )


def test_skew_zero_is_the_kl_divergence_and_the_limit_of_small_skews() -> None:
    student, teacher = pair(3, 5, dtype=torch.float64)
    plain = kl_divergence(student, teacher)
    torch.testing.assert_close(skew_kl(student, teacher, skew=0.0), plain)
    torch.testing.assert_close(skew_kl(student, teacher, skew=1e-9), plain, rtol=1e-5, atol=0)


def test_skew_bounds_the_divergence() -> None:
    opposite = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    assert skew_kl(*opposite, skew=0.1).item() == pytest.approx(-math.log(0.1))


# Direction


def best_bell_curve(loss: Loss) -> tuple[float, float]:
    """Mean and width, among many, of the bell curve closest to two peaks of width 0.5 at -3 and 3."""
    x = torch.linspace(-6, 6, 61)
    peaks = torch.logaddexp(-2 * (x - 3) ** 2, -2 * (x + 3) ** 2)
    candidates = torch.cartesian_prod(torch.linspace(-4, 4, 33), torch.linspace(0.25, 6, 24))
    curves = -0.5 * ((x - candidates[:, :1]) / candidates[:, 1:]) ** 2
    mean, width = candidates[loss(curves, peaks.expand_as(curves)).argmin()].tolist()
    return mean, width


def test_teacher_to_student_covers_both_peaks() -> None:
    mean, width = best_bell_curve(partial(kl_divergence, direction="teacher_to_student"))
    assert mean == 0
    assert width > 3


def test_student_to_teacher_seeks_one_peak() -> None:
    mean, width = best_bell_curve(partial(kl_divergence, direction="student_to_teacher"))
    assert abs(mean) == 3
    assert width == 0.5


@pytest.mark.parametrize("loss", [kl_divergence, skew_kl])
def test_refuses_an_unknown_direction_naming_both(loss: Loss) -> None:
    with pytest.raises(ValueError, match=r"teacher_to_student.*student_to_teacher.*'forward'"):
        loss(*pair(2, 3), direction="forward")


# Temperature


@every_loss
def test_gradient_norm_hardly_depends_on_a_high_temperature(name: str) -> None:
    student, teacher = pair(8, 20)
    at_8, at_16 = (
        gradient(partial(LOSSES[name], temperature=temperature), student, teacher).norm() for temperature in (8, 16)
    )
    assert at_16 == pytest.approx(at_8.item(), rel=0.1)


@every_loss
def test_temperature_squared_can_be_switched_off(name: str) -> None:
    student, teacher = pair(8, 20)
    with_square = LOSSES[name](student, teacher, temperature=4.0)
    without = LOSSES[name](student, teacher, temperature=4.0, temperature_squared=False)
    torch.testing.assert_close(with_square, 16 * without)
    torch.testing.assert_close(without, LOSSES[name](student / 4, teacher / 4))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
@every_loss
def test_refuses_a_temperature_that_is_not_positive(name: str, temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be positive, found {temperature}"):
        LOSSES[name](*pair(2, 3), temperature=temperature)


# Impossible classes and rows


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@every_loss
def test_impossible_classes_and_rows_leave_value_and_gradient_finite(
    name: str, dtype: torch.dtype, temperature: float
) -> None:
    reach = min(temperature, 1)  # logits that saturate the softmax leave nothing of the gradient in float16
    student, teacher = (reach * side for side in pair(4, 10, dtype=dtype))
    loss = partial(LOSSES[name], temperature=temperature)
    alone = loss(student[:, :7], teacher[:, :7]), gradient(loss, student[:, :7], teacher[:, :7])

    for side in (student, teacher):
        side[:, 7:] = -torch.inf  # a padded vocabulary
        side[3] = -torch.inf  # a fully masked row
    value, slope = loss(student, teacher), gradient(loss, student, teacher)

    # The square of the temperature multiplies the rounding of sums of another length, too.
    torch.testing.assert_close(value[:3], alone[0][:3], rtol=1e-5, atol=1e-6 * max(1.0, temperature**2))
    torch.testing.assert_close(slope[:3, :7], alone[1][:3])
    assert slope[:3].abs().max() > 0
    assert value[3] == 0
    assert not slope[3].any()
    assert not slope[:, 7:].any()


@every_loss
def test_gradient_for_the_teacher_is_finite_too(name: str) -> None:
    student, teacher = pair(4, 10)
    for side in (student, teacher):
        side[:, 7:] = side[3] = -torch.inf
    slope = gradient(lambda t, s: LOSSES[name](s, t), teacher, student)
    assert slope.isfinite().all()
    assert slope[:3].abs().max() > 0


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("kl_teacher_to_student", "student"),
        ("soft_cross_entropy", "student"),
        ("kl_student_to_teacher", "teacher"),
    ],
)
def test_is_infinite_where_a_likely_class_is_excluded_and_can_still_be_masked(name: str, without: str) -> None:
    sides = dict(zip(("student", "teacher"), pair(3, 5), strict=True))
    sides[without][1, 0] = -torch.inf
    sides[without][2] = -torch.inf
    student = sides["student"].requires_grad_()
    values = LOSSES[name](student, sides["teacher"])
    assert values.isinf().tolist() == [False, True, True]

    Term.of(values, mask=torch.tensor([True, False, False])).sum.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad[0].any()


@every_loss
def test_a_class_that_underflows_is_not_mistaken_for_a_likely_one(name: str) -> None:
    student, teacher = torch.tensor([[0.0, 1.0, -1e4]]), torch.tensor([[1.0, 0.0, -1e4]])
    for excluded in (student, teacher):
        other = excluded.clone()
        other[0, 2] = -torch.inf
        sides = (other, teacher) if excluded is student else (student, other)
        torch.testing.assert_close(LOSSES[name](*sides), LOSSES[name](student[:, :2], teacher[:, :2]))


@every_loss
def test_nan_logits_are_not_hidden(name: str) -> None:
    student, teacher = pair(2, 3)
    student[0, 0] = torch.nan
    assert LOSSES[name](student, teacher).isnan().tolist() == [True, False]


# Gradients and shapes


@pytest.mark.parametrize("shape", SHAPES)
@every_loss
def test_gradients_equal_finite_differences(name: str, shape: tuple[int, ...]) -> None:
    sides = [side.requires_grad_() for side in pair(*shape, dtype=torch.float64)]
    assert torch.autograd.gradcheck(partial(LOSSES[name], temperature=2.0), sides)


@every_loss
def test_refuses_different_shapes_naming_both(name: str) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) \(student\).*\(2, 4\) \(teacher\)"):
        LOSSES[name](torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("shape", [(5,), (2, 5, 2, 2, 2)])
@every_loss
def test_refuses_shapes_whose_class_axis_is_unknown(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="batch, classes"):
        LOSSES[name](torch.zeros(shape), torch.zeros(shape))


# Ranges of beta and skew


def test_jensen_shannon_is_continuous_in_beta_and_tends_to_zero_at_both_ends() -> None:
    student, teacher = pair(1, 1000, dtype=torch.float64)
    values = torch.stack([jensen_shannon(student, teacher, beta=b / 1000) for b in range(1, 1000)])
    assert values.diff(dim=0).abs().max() < 0.02 * values.max()
    for end in (1e-6, 1 - 1e-6):
        assert jensen_shannon(student, teacher, beta=end).item() < 1e-4


@pytest.mark.parametrize(("near_end", "name"), [(0, "kl_teacher_to_student"), (1, "kl_student_to_teacher")])
def test_jensen_shannon_approaches_a_scaled_kl_at_each_end(near_end: int, name: str) -> None:
    student, teacher = pair(3, 5, dtype=torch.float64)
    scaled = jensen_shannon(student, teacher, beta=abs(near_end - 1e-7)) / 1e-7
    torch.testing.assert_close(scaled, DIVERGENCES[name](student, teacher), rtol=1e-4, atol=0)


def test_jensen_shannon_is_symmetric_at_one_half() -> None:
    student, teacher = pair(3, 5)
    torch.testing.assert_close(jensen_shannon(student, teacher), jensen_shannon(teacher, student))


@pytest.mark.parametrize("beta", [0, 1, -0.1, 1.1, math.nan])
def test_jensen_shannon_refuses_its_ends_naming_the_two_kl_directions(beta: float) -> None:
    with pytest.raises(ValueError, match=f"found {beta}.*teacher_to_student.*student_to_teacher"):
        jensen_shannon(*pair(2, 3), beta=beta)


@pytest.mark.parametrize("skew", [-0.1, 1.0, math.nan])
def test_skew_kl_refuses_a_share_outside_its_range(skew: float) -> None:
    with pytest.raises(ValueError, match=f"skew must lie in .*found {skew}"):
        skew_kl(*pair(2, 3), skew=skew)

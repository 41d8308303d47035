from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from transfuse.losses import attention_map, attention_transfer, mean_squared_error


def feature(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looped_map(sample: Tensor, power: float) -> list[float]:
    channels, height, width = sample.shape
    sums = [
        sum(abs(sample[c, y, x].item()) ** power for c in range(channels)) for y in range(height) for x in range(width)
    ]
    length = math.sqrt(sum(s * s for s in sums))
    return [s / length for s in sums]


# Mean squared error


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 2, 2)])
def test_mean_squared_error_averages_over_all_but_the_batch(shape: tuple[int, ...]) -> None:
    student, teacher = feature(*shape), feature(*shape, seed=1)
    values = mean_squared_error(student, teacher)
    assert values.shape == (2,)
    for value, s, t in zip(values, student, teacher, strict=True):
        squares = [(a - b) ** 2 for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True)]
        assert value.item() == pytest.approx(sum(squares) / len(squares))


def test_mean_squared_error_does_not_overflow_in_half_precision() -> None:
    assert mean_squared_error(torch.full((1, 2), 1000.0).half(), torch.zeros(1, 2).half()).item() == 1e6


def test_mean_squared_error_refuses_different_shapes_naming_both() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) \(student\).*\(2, 4\) \(teacher\)"):
        mean_squared_error(torch.zeros(2, 3), torch.zeros(2, 4))


def test_mean_squared_error_refuses_features_without_an_axis_to_average_over() -> None:
    with pytest.raises(ValueError, match="two dimensions or more, found 1"):
        mean_squared_error(torch.zeros(3), torch.zeros(3))


# Attention


@pytest.mark.parametrize("power", [1, 2, 4])
def test_attention_map_equals_a_loop_written_from_the_formula(power: float) -> None:
    maps = attention_map(feature(2, 3, 2, 4), power)
    for found, sample in zip(maps, feature(2, 3, 2, 4), strict=True):
        assert found.tolist() == pytest.approx(looped_map(sample, power))


def test_attention_map_does_not_depend_on_the_scale_of_the_feature() -> None:
    tiny = 1e-8 * feature(2, 3, 4, 4).float()
    torch.testing.assert_close(attention_map(tiny), attention_map(1e8 * tiny))


@pytest.mark.parametrize("power", [1, 2])
def test_a_dead_feature_has_a_zero_map_and_a_zero_gradient(power: float) -> None:
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    values = attention_transfer(dead, torch.rand(2, 3, 4, 4), power)
    values.sum().backward()
    torch.testing.assert_close(values, torch.ones(2))
    assert dead.grad is not None
    assert not dead.grad.any()


def test_attention_transfer_is_the_distance_between_the_normalised_maps() -> None:
    student, teacher = feature(2, 3, 2, 4), feature(2, 5, 2, 4, seed=1)  # widths may differ
    values = attention_transfer(student, teacher)
    for value, s, t in zip(values, student, teacher, strict=True):
        assert value.item() == pytest.approx(math.dist(looped_map(s, 2), looped_map(t, 2)))


def test_attention_transfer_is_zero_with_a_zero_gradient_when_student_equals_teacher() -> None:
    student = feature(2, 3, 4, 4).requires_grad_()
    values = attention_transfer(student, student.detach())
    values.sum().backward()
    assert values.tolist() == [0.0, 0.0]
    assert student.grad is not None
    assert not student.grad.any()


def test_attention_transfer_refuses_maps_of_different_size_even_with_as_many_pixels() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) \(student\).*\(2, 3, 2, 8\) \(teacher\)"):
        attention_transfer(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 2, 8))


def test_attention_transfer_refuses_different_batches() -> None:
    with pytest.raises(ValueError, match="equal batch"):
        attention_transfer(torch.rand(2, 3, 4, 4), torch.rand(1, 3, 4, 4))


def test_attention_map_refuses_features_that_are_no_maps() -> None:
    with pytest.raises(ValueError, match=r"found \(2, 3\)"):
        attention_map(torch.rand(2, 3))


def test_attention_map_refuses_a_power_with_infinite_gradients() -> None:
    with pytest.raises(ValueError, match=r"power must be 1 or more, found 0\.5"):
        attention_map(torch.rand(2, 3, 4, 4), power=0.5)


def test_gradients_equal_finite_differences() -> None:
    sides = feature(2, 3, 2, 2).requires_grad_(), feature(2, 3, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(attention_transfer, sides)
    assert torch.autograd.gradcheck(mean_squared_error, sides)

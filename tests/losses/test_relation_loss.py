from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from transfuse.losses import rkd_angle, rkd_distance

Relation = Callable[[Tensor, Tensor], Tensor]
Rows = list[list[float]]
both = pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])


def embeddings(batch: int, features: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def huber(a: float, b: float) -> float:
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def mean_distance(rows: Rows) -> float:
    distances = [math.dist(a, b) for a, b in itertools.permutations(rows, 2)]
    return sum(distances) / len(distances)


def cosine(i: list[float], j: list[float], k: list[float]) -> float:
    to_i, to_k = ([a - b for a, b in zip(end, j, strict=True)] for end in (i, k))
    lengths = math.hypot(*to_i) * math.hypot(*to_k)
    return sum(a * b for a, b in zip(to_i, to_k, strict=True)) / lengths if lengths else 0.0


def looped_distance(s: Rows, t: Rows) -> float:
    s_mean, t_mean, n = mean_distance(s), mean_distance(t), len(s)
    pairs = itertools.product(range(n), repeat=2)
    return sum(huber(math.dist(s[i], s[j]) / s_mean, math.dist(t[i], t[j]) / t_mean) for i, j in pairs) / n**2


def looped_angle(s: Rows, t: Rows) -> float:
    triplets = itertools.product(range(len(s)), repeat=3)
    return sum(huber(cosine(s[i], s[j], s[k]), cosine(t[i], t[j], t[k])) for i, j, k in triplets) / len(s) ** 3


@pytest.mark.parametrize(("loss", "loop"), [(rkd_distance, looped_distance), (rkd_angle, looped_angle)])
@pytest.mark.parametrize("coinciding", [False, True])
def test_equals_a_loop_written_from_the_formula(
    loss: Relation, loop: Callable[[Rows, Rows], float], coinciding: bool
) -> None:
    student, teacher = embeddings(5, 3), embeddings(5, 7, seed=1)  # widths differ
    student[4] = 10 * student[4]  # the Huber loss is in its linear part for some pairs
    if coinciding:
        student[1] = student[0]
    assert loss(student, teacher).item() == pytest.approx(loop(student.tolist(), teacher.tolist()), rel=1e-10)


@both
def test_is_zero_for_a_rotated_scaled_and_moved_teacher(loss: Relation) -> None:
    teacher = embeddings(6, 3)
    rotation = torch.linalg.qr(embeddings(3, 3, seed=1))[0]
    assert loss(5 * teacher @ rotation + 2, teacher).item() == pytest.approx(0, abs=1e-20)


@both
def test_more_dimensions_are_flattened(loss: Relation) -> None:
    student, teacher = embeddings(5, 12), embeddings(5, 4, seed=1)
    assert loss(student.view(5, 3, 2, 2), teacher) == loss(student, teacher)


@both
def test_gradients_are_finite_and_moderate_when_rows_coincide(loss: Relation) -> None:
    student = embeddings(6, 3).float()
    student[1] = student[0]
    student.requires_grad_()
    loss(student, embeddings(6, 3, seed=1).float()).backward()
    assert student.grad is not None
    assert 0 < student.grad.abs().max() < 10


@both
def test_collapsed_embeddings_give_a_finite_value_and_no_gradient(loss: Relation) -> None:
    student = torch.ones(4, 3, requires_grad=True)
    value = loss(student, embeddings(4, 3).float())
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert not student.grad.any()


def test_distances_of_close_rows_survive_a_large_offset() -> None:
    rows = embeddings(6, 3)
    assert rkd_distance((rows + 1000).float(), rows.float()).item() < 1e-6


@both
def test_autocast_does_not_lower_the_precision(loss: Relation) -> None:
    student, teacher = embeddings(6, 3).float(), embeddings(6, 3, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(student, teacher)
    torch.testing.assert_close(inside, loss(student, teacher), rtol=0, atol=0)


@both
def test_gradients_equal_finite_differences(loss: Relation) -> None:
    sides = embeddings(4, 3).requires_grad_(), embeddings(4, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(loss, sides)


@pytest.mark.parametrize(("loss", "fewest"), [(rkd_distance, 2), (rkd_angle, 3)])
def test_refuses_fewer_samples_than_it_relates(loss: Relation, fewest: int) -> None:
    too_few, enough = embeddings(fewest - 1, 3), embeddings(3, 3)
    with pytest.raises(ValueError, match=f"between {fewest} samples, found {fewest - 1}"):
        loss(too_few, too_few)
    assert loss(enough, embeddings(3, 3, seed=1)) > 0


def test_two_samples_have_a_relative_distance_of_one_whatever_they_are() -> None:
    assert rkd_distance(embeddings(2, 3), embeddings(2, 3, seed=1)).item() == pytest.approx(0, abs=1e-20)


@both
def test_refuses_different_batches_naming_both_shapes(loss: Relation) -> None:
    with pytest.raises(ValueError, match=r"\(4, 3\) \(student\) and \(5, 3\) \(teacher\)"):
        loss(torch.zeros(4, 3), torch.zeros(5, 3))


@both
def test_refuses_embeddings_without_a_feature_axis(loss: Relation) -> None:
    with pytest.raises(ValueError, match=r"found \(4,\)"):
        loss(torch.zeros(4), torch.zeros(4))

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from transfuse.losses import top_k_decoupled


def logits(rows: int = 6, classes: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_equals_a_loop_written_from_the_formula(k):
    student, teacher = logits(), logits(seed=1)
    found = top_k_decoupled(student, teacher, k=k, alpha=0.7, beta=2.0)
    for value, s, t in zip(found, student.tolist(), teacher.tolist(), strict=True):
        order = sorted(range(10), key=lambda i: -t[i])
        groups = (order[:k], order[-k:], order[k:-k])
        large, small, rest = (cosine([s[i] for i in g], [t[i] for i in g]) for g in groups)
        assert value.item() == pytest.approx(1 - (0.7 * large + 2.0 * small + rest))


def test_the_groups_are_disjoint_and_cover_all_classes():
    """A student that agrees in one class alone has one cosine, which the weights 1, 10**4 and 10**8 tell apart."""
    teacher = torch.linspace(-5, 4, 10, dtype=torch.float64)[None]
    found = []
    for i in range(10):
        student = torch.zeros_like(teacher)
        student[0, i] = teacher[0, i]
        similarity = 1 - top_k_decoupled(student, teacher, alpha=1e4, beta=1e8).item()
        found.append("rest" if similarity < 2 else "large" if similarity < 2e4 else "small")
    found[5] = "rest"  # its logit is zero, so it agrees with nothing
    assert found == ["small"] * 3 + ["rest"] * 4 + ["large"] * 3


@pytest.mark.parametrize(("normalise", "least"), [(False, 1 - 3.5), (True, 0.0)])
def test_a_multiple_of_the_teacher_has_the_least_value(normalise, least):
    values = top_k_decoupled(7.0 * logits(), logits(), alpha=2.0, beta=0.5, normalise=normalise)
    assert values.tolist() == pytest.approx([least] * 6)
    assert (top_k_decoupled(logits(seed=1), logits(), alpha=2.0, beta=0.5, normalise=normalise) > least).all()


def test_does_not_depend_on_the_scale_of_the_student():
    assert torch.allclose(top_k_decoupled(5 * logits(), logits(seed=1)), top_k_decoupled(logits(), logits(seed=1)))


def test_a_group_of_zeros_counts_nothing_and_has_a_finite_gradient():
    student = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    value = top_k_decoupled(student, logits(1, 6), k=2)
    value.sum().backward()
    assert value.tolist() == [1.0]
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(("k", "classes"), [(1, 10), (5, 10), (2, 5)])
def test_refuses_groups_of_fewer_than_two(k, classes):
    with pytest.raises(ValueError, match=f"k is {k} for {classes} classes"):
        top_k_decoupled(logits(2, classes), logits(2, classes), k=k)


def test_refuses_different_shapes():
    with pytest.raises(ValueError, match=r"\(6, 10\) \(student\)"):
        top_k_decoupled(logits(), logits(6, 9))

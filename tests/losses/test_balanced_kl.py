"""Both divergences, balanced by which side is surer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transfuse.losses import balanced_kl, entropy, kl_divergence

TEACHER, STUDENT = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.9, 0.05, 0.05]]).log()


def rows(count: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 5, generator=draw, dtype=torch.float64).unbind()


def both(student: Tensor, teacher: Tensor, **options: float) -> tuple[Tensor, Tensor]:
    forward = kl_divergence(student, teacher, **options)
    return forward, kl_divergence(student, teacher, direction="student_to_teacher", **options)


def test_an_over_confident_student_weighs_the_forward_divergence_by_nu():
    forward, reverse = both(STUDENT, TEACHER)
    assert entropy(TEACHER).item() == pytest.approx(0.801819, abs=1e-6)
    assert entropy(STUDENT).item() == pytest.approx(0.394398, abs=1e-6)
    assert forward.item() == pytest.approx(0.170653, abs=1e-6)
    assert reverse.item() == pytest.approx(0.122211, abs=2e-6)
    assert balanced_kl(STUDENT, TEACHER, nu=2.0).item() == pytest.approx(0.463518, abs=2e-6)


def test_an_under_confident_student_weighs_the_reverse_divergence_by_nu():
    forward, reverse = both(TEACHER, STUDENT)
    assert balanced_kl(TEACHER, STUDENT, nu=3.0).item() == pytest.approx((forward + 3 * reverse).item())


def test_equal_entropies_weigh_both_alike():
    student, teacher = TEACHER[:, :2], TEACHER[:, :2].flip(1)
    forward, reverse = both(student, teacher)
    assert balanced_kl(student, teacher, nu=5.0).item() == pytest.approx((forward + reverse).item())


def test_without_balance_it_is_the_jeffreys_divergence():
    student, teacher = rows()
    forward, reverse = both(student, teacher, temperature=3.0)
    assert torch.allclose(balanced_kl(student, teacher, nu=1.0, temperature=3.0), forward + reverse)
    assert torch.allclose(balanced_kl(student, teacher, nu=1.0, smooth=0.2, temperature=3.0), forward + reverse)


def test_smooth_weights_are_sigmoids_of_the_gap_and_become_the_step():
    student, teacher = rows()
    forward, reverse = both(student, teacher)
    gap = entropy(teacher) - entropy(student)
    weights = [1 + 2 * torch.sigmoid(sign * gap / 0.5) for sign in (1, -1)]
    expected = weights[0] * forward + weights[1] * reverse
    assert torch.allclose(balanced_kl(student, teacher, nu=3.0, smooth=0.5), expected)
    step = balanced_kl(student, teacher, nu=3.0)
    assert torch.allclose(balanced_kl(student, teacher, nu=3.0, smooth=1e-6), step)


def test_value_and_gradient_are_zero_where_both_agree():
    student, _ = rows()
    student = student.clone().requires_grad_()
    value = balanced_kl(student, student.detach(), temperature=3.0)
    value.sum().backward()
    assert value.abs().max() < 1e-12
    assert student.grad.abs().max() < 1e-12


def test_the_gradient_is_that_of_the_closed_forms_and_none_flows_through_the_weights():
    student, teacher = rows()
    student = student.clone().requires_grad_()
    t, nu = 3.0, 2.0
    balanced_kl(student, teacher, nu=nu, temperature=t, temperature_squared=False).sum().backward()
    p_s, p_t = (student.detach() / t).softmax(-1), (teacher / t).softmax(-1)
    reverse = (p_s * (p_s / p_t).log()).sum(-1, keepdim=True)
    gap = entropy(teacher / t) - entropy(student.detach() / t)
    w_f, w_r = torch.where(gap > 0, nu, 1.0)[:, None], torch.where(gap < 0, nu, 1.0)[:, None]
    assert len(w_f.unique()) == 2
    expected = (w_f * (p_s - p_t) + w_r * p_s * ((p_s / p_t).log() - reverse)) / t
    assert torch.allclose(student.grad, expected)


def test_samples_in_another_order_have_their_values_in_that_order():
    student, teacher = rows()
    order = torch.tensor([3, 0, 6, 5, 1, 2, 4])
    assert torch.equal(balanced_kl(student[order], teacher[order]), balanced_kl(student, teacher)[order])


def test_pixels_and_tokens_are_rows_like_samples():
    student, teacher = rows(6)
    pixels = [x.T.reshape(1, 5, 2, 3) for x in (student, teacher)]
    assert torch.allclose(balanced_kl(*pixels).flatten(), balanced_kl(student, teacher))
    tokens = [x.view(2, 3, 5) for x in (student, teacher)]
    assert torch.allclose(balanced_kl(*tokens).flatten(), balanced_kl(student, teacher))


def test_a_teacher_that_rules_out_almost_everything_gives_finite_values():
    student, teacher = torch.zeros(1, 3), torch.tensor([[300.0, 0.0, -300.0]])
    assert balanced_kl(student, teacher).isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nu": 0.5}, "nu must be 1"),
        ({"smooth": 0.0}, "smooth must be positive"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_refuses_what_is_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        balanced_kl(STUDENT, TEACHER, **options)
    with pytest.raises(ValueError, match="equal shapes"):
        balanced_kl(STUDENT, TEACHER[:, :2])

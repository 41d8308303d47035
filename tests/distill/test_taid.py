"""TAID against the closed forms of its sheet."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from helpers import language_model, ragged_tokens, trainer
from torch import Tensor

from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, VocabularyError
from transfuse.core.outputs import Outputs
from transfuse.core.run import Run
from transfuse.distill import TAID
from transfuse.losses import kl_divergence, soft_cross_entropy

LOGITS = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])


def loss_at(position: float, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Any:
    method = TAID()
    method.position.fill_(position)
    batch = Batch(inputs=student.detach(), mask=mask)
    return method.loss(Outputs(student), Outputs(teacher), batch, Clock())["taid"]


def moved(method: TAID, losses: list[float], steps: int) -> list[float]:
    """The positions after updates with these losses."""
    run = Run({}, {})
    run.clock = Clock()
    run.clock.steps = steps
    positions = []
    for loss in losses:
        method.after_update(None, {"taid": torch.tensor(loss)}, run)
        positions.append(method.position.item())
        run.clock.step += 1
    return positions


def test_at_the_teacher_it_is_the_soft_cross_entropy_and_at_the_student_it_teaches_nothing():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 7, requires_grad=True), torch.randn(4, 7)
    end = loss_at(1.0, student, teacher)
    assert end.sum.item() == pytest.approx(soft_cross_entropy(student, teacher).sum().item())
    log_t = teacher.log_softmax(-1)
    entropy = -(log_t.exp() * log_t).sum()
    assert (end.sum - entropy).item() == pytest.approx(kl_divergence(student, teacher).sum().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss_at(0.0, student, teacher).sum, student)
    assert gradient.abs().max() < 1e-7


def test_the_example_of_the_sheet():
    student, teacher = LOGITS[0].clone().requires_grad_(), LOGITS[1]
    term = loss_at(0.5, student, teacher)
    assert term.mean.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(term.mean, student)
    assert gradient[0].tolist() == pytest.approx([-0.23106, 0.23106], abs=1e-5)


def test_the_gradient_is_student_minus_target_and_a_constant_per_token_changes_nothing():
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    term = loss_at(0.3, student, teacher, mask)
    (gradient,) = torch.autograd.grad(term.mean, student)
    target = torch.lerp(student, teacher, 0.3).softmax(-1)
    expected = torch.where(mask[..., None], student.softmax(-1) - target, 0) / 3
    assert torch.allclose(gradient, expected, atol=1e-6)
    shifted = loss_at(0.3, student + torch.randn(2, 3, 1), teacher + torch.randn(2, 3, 1), mask)
    assert shifted.sum.item() == pytest.approx(term.sum.item(), rel=1e-5)


def test_the_step_of_the_sheet():
    method = TAID(start=0.4)
    positions = moved(method, [1.0, 0.9], steps=10**9)
    assert positions[0] == pytest.approx(0.4)
    assert method.trend.item() == pytest.approx(0.001)
    assert positions[1] - 0.4 == pytest.approx(1.50075e-4, rel=1e-3)


def test_without_a_rate_the_schedule_is_linear_and_ends_at_its_end():
    positions = moved(TAID(start=0.2, end=0.8, rate=0.0), [3.0, 2.0, 5.0, 1.0], steps=4)
    assert positions == pytest.approx([0.35, 0.5, 0.65, 0.8])


def test_it_never_falls_back_nor_passes_its_end():
    torch.manual_seed(2)
    positions = moved(TAID(rate=0.3, end=0.9), (5 * torch.rand(40)).tolist(), steps=40)
    assert all(a <= b for a, b in itertools.pairwise(positions))
    assert max(positions) == pytest.approx(0.9)
    assert positions[5] > 0.4 + 0.5 * 6 / 40


def test_micro_batches_move_it_once():
    def end(**options: Any) -> Tensor:
        method = TAID(rate=0.1)
        given = {"task": "language-model", "steps": 3, **options}
        trainer(method, language_model(), language_model(1), ragged_tokens(), **given).fit()
        return method.position

    assert end().item() == pytest.approx(end(micro_batch=2).item(), abs=1e-6)


def test_it_learns_from_a_teacher_and_refuses_what_cannot_work():
    student, teacher = language_model(), language_model(1)
    before = copy.deepcopy(student)
    trainer(TAID(alpha=0.5), student, teacher, ragged_tokens(), task="language-model").fit()
    assert not torch.equal(student.head.weight, before.head.weight)
    teacher.head = torch.nn.Linear(8, 13)
    with pytest.raises(VocabularyError, match="11 classes"):
        trainer(TAID(), language_model(), teacher, ragged_tokens(), task="language-model").fit()
    for wrong in ({"start": 1.0}, {"start": 0.5, "end": 0.4}, {"rate": -1}, {"momentum": 1}, {"alpha": 2}):
        with pytest.raises(InputError, match="TAID"):
            TAID(**wrong)

"""Self-Evolution KD against the numbers of its sheet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.distill import SelfEvolution
from transfuse.losses import cross_entropy, kl_divergence

P, T = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.6, 0.4]])


def loss(method: SelfEvolution, student: Tensor, teacher: Tensor, labels: Tensor) -> Any:
    """Of rows, each a text of one scored token."""
    batch = Batch(inputs=labels[:, None], labels=labels[:, None], mask=torch.ones(len(labels), 1, dtype=torch.bool))
    return method.loss(Outputs(student[:, None]), Outputs(teacher[:, None]), batch, Clock())["evolution"]


def random_rows(count: int = 9, classes: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(count, classes, requires_grad=True),
        2 * torch.randn(count, classes),
        torch.arange(count) % classes,
    )


def test_the_example_of_the_sheet():
    student = P.log().requires_grad_()
    method = SelfEvolution(threshold=0.0)
    log_q = method.target(T.log(), torch.tensor([0]))
    assert log_q.exp()[0].tolist() == pytest.approx([0.8, 0.2])
    d, _ = method.difficulty(P.log(), log_q)
    assert d.item() == pytest.approx(0.831777, abs=1e-6)
    method.difficulty = lambda *_: (d, torch.tensor([0.5]))
    term = loss(method, student, T.log(), torch.tensor([0]))
    assert term.mean.item() == pytest.approx(0.192745, abs=1e-6)
    assert torch.autograd.grad(term.mean, student)[0][0].tolist() == pytest.approx([-0.096, 0.096], abs=1e-6)
    plain = loss(SelfEvolution(most=0.0), student, T.log(), torch.tensor([0]))
    assert torch.autograd.grad(plain.mean, student)[0][0].tolist() == pytest.approx([-0.6, 0.6], abs=1e-6)
    other = SelfEvolution(proxy="target")
    other.difficulty = method.difficulty
    term = loss(other, student, T.log(), torch.tensor([0]))
    assert torch.autograd.grad(term.mean, student)[0][0].tolist() == pytest.approx([-0.3, 0.3], abs=1e-6)


def test_the_limits():
    student, teacher, labels = random_rows()
    plain = SelfEvolution(most=0.0)
    q = plain.target(teacher, labels)
    assert loss(plain, student, teacher, labels).sum.item() == pytest.approx(
        kl_divergence(student, q).sum().item(), rel=1e-5
    )
    hard = loss(SelfEvolution(blend=1.0, most=0.0), student, teacher, labels)
    assert hard.sum.item() == pytest.approx(cross_entropy(student, labels).sum().item(), rel=1e-5)
    forward = loss(SelfEvolution(blend=0.0, most=0.0), student, teacher, labels)
    assert forward.sum.item() == pytest.approx(kl_divergence(student, teacher).sum().item(), rel=1e-5)
    same = loss(SelfEvolution(), q.clone(), teacher, labels)
    assert same.sum.item() == pytest.approx(0.0, abs=1e-6)


def test_the_gradient_of_a_hard_token_is_the_formula_s_and_smaller_than_without_a_prior():
    student, teacher, labels = random_rows()
    method = SelfEvolution(threshold=0.0)
    term = loss(method, student, teacher, labels)
    (found,) = torch.autograd.grad(term.sum, student)
    p, q = student.detach().softmax(-1), method.target(teacher, labels).exp()
    g = method.difficulty(p.log(), q.log())[1][:, None]
    r = q * (1 - g) / ((1 - g) * p + g * q)
    assert torch.allclose(found, p * ((r * p).sum(-1, keepdim=True) - r), atol=1e-6)
    plain = loss(SelfEvolution(most=0.0), student, teacher, labels)
    (undamped,) = torch.autograd.grad(plain.sum, student)
    assert (found.norm(dim=1) < undamped.norm(dim=1)).all()
    assert term.sum < plain.sum


def test_what_is_hard_follows_the_difficulty_alone():
    student, teacher, labels = random_rows(20)
    method = SelfEvolution()
    log_s, log_q = student.detach().log_softmax(-1), method.target(teacher, labels)
    d, g = method.difficulty(log_s, log_q)
    assert (g == 0).any()
    assert ((g > 0) == (d > d.mean())).all()
    order = torch.randperm(20)
    assert torch.equal(method.difficulty(log_s[order], log_q[order])[1], g[order])


def test_an_excluded_class_keeps_the_loss_finite():
    student, teacher, labels = random_rows()
    excluded = student.detach().clone()
    excluded[:, -1] = -torch.inf
    excluded.requires_grad_()
    teacher[:, -1] = -torch.inf
    labels = labels.clamp(max=5)
    term = loss(SelfEvolution(), excluded, teacher, labels)
    assert term.sum.isfinite()
    assert torch.autograd.grad(term.sum, excluded)[0].isfinite().all()


def test_wrong_arguments_and_data_are_refused():
    for wrong in ({"blend": 1.1}, {"most": 1.0}, {"proxy": "teacher"}, {"labels": -1.0}, {"threshold": -1.0}):
        with pytest.raises(InputError, match="SelfEvolution"):
            SelfEvolution(**wrong)
    with pytest.raises(InputError, match="has none"):
        SelfEvolution().loss(Outputs(P), Outputs(T), Batch(inputs=P), Clock())

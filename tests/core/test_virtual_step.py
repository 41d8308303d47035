"""The differentiable inner step, on quadratics whose derivatives are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transfuse.core.virtual import virtual_step


def quadratic(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(4, 4, generator=draw, dtype=torch.float64)
    return root @ root.T, torch.randn(4, generator=draw, dtype=torch.float64)


(A, u), (B, v) = quadratic(1), quadratic(2)
theta = torch.randn(4, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()


def loss(matrix: Tensor, centre: Tensor, at: Tensor) -> Tensor:
    return 0.5 * (at - centre) @ matrix @ (at - centre)


def objective(lr: float, decay: float = 0.0, first_order: bool = False) -> Tensor:
    acquire = loss(A, u, theta)
    moved = virtual_step(acquire, {"theta": theta}, lr, decay, first_order)
    return acquire + loss(B, v, moved["theta"])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_gradient_of_the_meta_term_carries_the_hessian(decay):
    lr = 0.07
    (gradient,) = torch.autograd.grad(objective(lr, decay), theta)
    moved = (1 - lr * decay) * theta - lr * A @ (theta - u)
    expected = A @ (theta - u) + ((1 - lr * decay) * torch.eye(4) - lr * A) @ B @ (moved - v)
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_first_order_leaves_the_hessian_out():
    (gradient,) = torch.autograd.grad(objective(0.07, first_order=True), theta)
    moved = theta - 0.07 * A @ (theta - u)
    assert torch.allclose(gradient, A @ (theta - u) + B @ (moved - v), atol=1e-6)


def test_a_step_of_length_zero_is_the_sum_of_the_losses():
    assert objective(0.0).item() == pytest.approx((loss(A, u, theta) + loss(B, v, theta)).item())


def test_to_first_order_the_objective_falls_by_the_agreement_of_the_gradients():
    agreement = (A @ (theta - u)) @ (B @ (theta - v))
    slope = (objective(1e-7) - objective(0.0)) / 1e-7
    assert slope.item() == pytest.approx(-agreement.item(), rel=1e-4)


def test_parameters_that_need_no_gradient_or_have_none_are_handed_on():
    frozen, idle = torch.ones(2), torch.ones(2, requires_grad=True)
    moved = virtual_step(loss(A, u, theta), {"theta": theta, "frozen": frozen, "idle": idle}, 0.1, 0.5)
    assert moved["frozen"] is frozen
    assert torch.equal(moved["idle"], 0.95 * idle)
    assert list(moved) == ["theta", "frozen", "idle"]

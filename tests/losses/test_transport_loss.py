from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

from transfuse.losses import cosine_cost, cut_cost, ipot, sinkhorn


def rows(count: int = 16, width: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cheapest(cost: Tensor) -> float:
    """With equal marginals some cheapest plan is a permutation."""
    return float(cost.numpy()[linear_sum_assignment(cost.numpy())].mean())


def cheapest_weighted(cost: Tensor, given: Tensor, taken: Tensor) -> float:
    m, n = cost.shape
    sums = np.concatenate([np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))])
    solution = linprog(cost.numpy().ravel(), A_eq=sums, b_eq=np.concatenate([given, taken]))
    assert solution.success
    return float(solution.fun)


def test_ipot_finds_the_cheapest_plan():
    for seed in range(5):
        cost = cosine_cost(rows(seed=seed), rows(seed=seed + 100))
        assert float((ipot(cost, iterations=200) * cost).sum()) == pytest.approx(cheapest(cost), abs=1e-3)


def test_ipot_with_weights_finds_the_cheapest_plan():
    cost = cosine_cost(rows(5), rows(7, seed=1))
    given, taken = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0]), torch.tensor([0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.2])
    plan = ipot(cost, given, taken, iterations=2000)
    assert float((plan * cost).sum()) == pytest.approx(cheapest_weighted(cost, given, taken), abs=1e-3)
    assert plan[4].max() < 1e-6, "a row of weight zero sends nothing"


def test_sinkhorn_tends_to_the_cheapest_plan_with_epsilon():
    cost = cosine_cost(rows(), rows(seed=1))
    excess = [
        float((sinkhorn(cost, epsilon=e, iterations=2000) * cost).sum()) - cheapest(cost) for e in (0.5, 0.1, 0.02)
    ]
    assert excess[0] > excess[1] > excess[2] > -1e-6
    assert excess[2] < 0.01


@pytest.mark.parametrize("solve", [ipot, sinkhorn])
def test_the_marginals_are_the_weights(solve):
    cost = cosine_cost(rows(), rows(seed=1))
    plan = solve(cost, iterations=1000)
    assert (plan >= 0).all()
    assert torch.allclose(plan.sum(0), torch.full((16,), 1 / 16, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(plan.sum(1), torch.full((16,), 1 / 16, dtype=torch.float64), atol=1e-4)


@pytest.mark.parametrize(("solve", "cost"), [(ipot, 1e-3), (lambda c: sinkhorn(c, epsilon=0.01, iterations=500), 1e-2)])
def test_a_set_is_carried_onto_its_permutation_for_nothing(solve, cost):
    x = rows()
    y = x[torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    table = cosine_cost(x, y)
    assert float((solve(table) * table).sum()) < cost


def test_sinkhorn_equals_a_loop_that_scales_rows_and_columns():
    cost = cosine_cost(rows(6), rows(4, seed=1))
    kernel = np.exp(-cost.numpy() / 0.3)
    u, v = np.ones(6), np.ones(4)
    for _ in range(20):
        u = (1 / 6) / (kernel @ v)
        v = (1 / 4) / (kernel.T @ u)
    expected = torch.from_numpy(u[:, None] * kernel * v)
    assert torch.allclose(sinkhorn(cost, epsilon=0.3, iterations=20), expected)


def test_ipot_equals_a_loop_written_from_the_recursion():
    cost = cosine_cost(rows(6), rows(4, seed=1))
    kernel, plan, sigma = np.exp(-cost.numpy() / 0.5), np.ones((6, 4)), np.ones(4) / 4
    for _ in range(30):
        q = kernel * plan
        for _ in range(2):
            delta = 1 / (6 * (q @ sigma))
            sigma = 1 / (4 * (q.T @ delta))
        plan = delta[:, None] * q * sigma
    assert torch.allclose(ipot(cost, iterations=30, inner=2), torch.from_numpy(plan), atol=1e-9)


@pytest.mark.parametrize("solve", [ipot, sinkhorn])
def test_a_batch_of_costs_is_solved_one_by_one(solve):
    costs = torch.stack([cosine_cost(rows(5, seed=i), rows(6, seed=i + 9)) for i in range(3)])
    assert torch.allclose(solve(costs), torch.stack([solve(c) for c in costs]))


@pytest.mark.parametrize("solve", [lambda c: ipot(c, iterations=300), lambda c: sinkhorn(c, epsilon=1e-3)])
def test_small_steps_do_not_underflow_in_single_precision(solve):
    cost = 100 * cosine_cost(rows().float(), rows(seed=1).float())
    plan = solve(cost)
    assert plan.dtype == torch.float32
    assert plan.isfinite().all()
    assert plan.sum().item() == pytest.approx(1.0, abs=1e-4)


def test_the_gradient_through_the_cost_alone_is_that_of_the_cheapest_cost():
    """Envelope theorem, against finite differences of the solved problem."""
    x, y = rows(5, 3).requires_grad_(), rows(5, 3, seed=1)
    cost = cosine_cost(x, y)
    plan = ipot(cost, iterations=500)
    assert not plan.requires_grad
    (gradient,) = torch.autograd.grad((plan * cost).sum(), x)
    step = torch.zeros_like(x)
    step[2, 1] = 1e-4
    up, down = (cheapest(cosine_cost(x.detach() + s, y)) for s in (step, -step))
    assert gradient[2, 1].item() == pytest.approx((up - down) / 2e-4, abs=1e-3)


def test_cosine_cost_has_its_closed_form_and_zeros_cost_one():
    one, other = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    assert cosine_cost(one, other).tolist() == [[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]]


def test_cut_cost_makes_the_cheapest_pairs_free():
    cost = torch.tensor([[0.0, 0.5], [1.0, 2.0]])
    assert torch.allclose(cut_cost(cost, 0.25), torch.tensor([[0.0, 0.0], [0.5, 1.5]]))
    batch = torch.stack([cost, 3 * cost])
    assert torch.allclose(cut_cost(batch, 0.25), torch.stack([cut_cost(cost, 0.25), 3 * cut_cost(cost, 0.25)]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sinkhorn(torch.zeros(3)), r"found \(3,\)"),
        (lambda: sinkhorn(torch.zeros(3, 3), epsilon=0), "epsilon must be positive, found 0"),
        (lambda: ipot(torch.zeros(3, 3), beta=0), "beta must be positive, found 0"),
        (lambda: ipot(torch.zeros(3, 4), rows=torch.ones(4)), r"the weights of the rows are \(4,\), the cost has 3"),
        (lambda: ipot(torch.zeros(3, 4), columns=torch.ones(3)), r"the weights of the columns are \(3,\)"),
        (lambda: cosine_cost(torch.zeros(3, 4), torch.zeros(3, 5)), "same width"),
    ],
)
def test_says_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Directions between objectives: closed forms, a grid over the simplex, and what every solution must satisfy."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Tensor

from transfuse.core.errors import DivergenceError, MissingExtraError
from transfuse.core.solvers import gram, guided_descent, shortest, weighted, without_conflicts


def problem(seed: int, objectives: int = 3, width: int = 4) -> tuple[Tensor, Tensor]:
    """Products of random gradients, and with a random guide."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(objectives + 1, width, generator=draw, dtype=torch.float64)
    products = rows @ rows.T
    return products[:-1, :-1], products[:-1, -1]


def of(*rows: list[float], guide: list[float] | None = None) -> tuple[Tensor, Tensor]:
    g = torch.tensor(rows, dtype=torch.float64)
    v = torch.zeros(g.shape[1], dtype=torch.float64) if guide is None else torch.tensor(guide, dtype=torch.float64)
    return g @ g.T, g @ v


def on_simplex(weights: Tensor) -> bool:
    return bool((weights >= 0).all()) and abs(float(weights.sum()) - 1) < 1e-9


def test_gram_is_the_products_of_whole_gradients_taken_tensor_by_tensor():
    draw = torch.Generator().manual_seed(0)
    shapes = [(3, 2), (4,), ()]
    rows = [[torch.randn(s, generator=draw) for s in shapes] for _ in range(3)]
    flat = torch.stack([torch.cat([t.flatten() for t in row]) for row in rows]).double()
    assert torch.allclose(gram(rows), flat @ flat.T)
    combined = torch.cat([t.flatten() for t in weighted(rows, torch.tensor([0.5, -1.0, 2.0]))])
    assert torch.allclose(combined.double(), 0.5 * flat[0] - flat[1] + 2 * flat[2], atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_refused(value):
    with pytest.raises(DivergenceError, match="not finite"):
        gram([[torch.ones(2)], [torch.tensor([1.0, value])]])


def test_descent_raises_no_objective_and_lies_on_the_simplex():
    dropped = []
    for seed in range(120):
        products, guide = problem(seed)
        found = guided_descent(products, guide, follow=False)
        assert on_simplex(found.weights)
        assert (products @ found.weights >= -1e-8).all()
        if not found.dropped:
            assert found.weights @ guide >= min(0.0, float(guide.max())) - 1e-8
        dropped.append(found.dropped)
    assert max(dropped) == 1  # without the guide's constraint there is always a solution
    assert 0.1 < dropped.count(1) / len(dropped) < 0.3  # about one in five, as the sheet measured


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_descent_does_not_depend_on_the_size_of_gradients(scale):
    for seed in range(20):
        products, guide = problem(seed)
        one, other = (guided_descent(s**2 * products, s**2 * guide, follow=False) for s in (1.0, scale))
        assert torch.allclose(one.weights, other.weights, atol=1e-6) and one.dropped == other.dropped


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_size_of_the_guide_does_not_change_whether_descent_is_possible(scale):
    for seed in range(20):
        products, guide = problem(seed)
        one, other = (guided_descent(products, s * guide, follow=False) for s in (1.0, scale))
        assert one.dropped == other.dropped
        assert torch.allclose(one.weights, other.weights, atol=1e-6)


@pytest.mark.parametrize("follow", [True, False])
def test_it_is_as_good_as_the_best_point_of_a_fine_grid(follow):
    steps = torch.arange(0, 1.0001, 0.01, dtype=torch.float64)
    grid = torch.stack([torch.stack([a, b, 1 - a - b]) for a, b in itertools.product(steps, steps) if a + b <= 1.0001])
    compared = 0
    for seed in range(40):
        products, guide = problem(seed)
        slopes, towards = grid @ products, grid @ guide
        if follow:
            bounds = torch.where(guide > 0, -torch.inf, guide) if (guide > 0).any() else torch.zeros(3)
            if (guide > 0).any():
                bounds[guide.argmax()] = 0.0
            gain, allowed = towards, (slopes >= bounds).all(1)
        else:
            least = min(0.0, float(guide.max()))
            gain, allowed = slopes.sum(1), (slopes >= 0).all(1) & (towards >= least)
        found = guided_descent(products, guide, follow)
        if not allowed.any() or found.dropped:
            continue
        best = float(gain[allowed].max())
        own = float(found.weights @ guide if follow else (products @ found.weights).sum())
        assert own >= best - 1e-8  # the grid cannot be better
        assert own <= best + max(1e-2, 0.05 * float(gain.max() - gain.min()))  # nor much worse
        compared += 1
    assert compared > 20


def test_orthogonal_gradients_are_a_tie_that_the_guide_breaks():
    products, guide = of([1.0, 0.0], [0.0, 1.0], guide=[1.0, -3.0])
    found = guided_descent(products, guide, follow=False).weights
    assert float((products @ found).sum()) == pytest.approx(1.0)
    assert found @ guide >= -1e-9
    assert guided_descent(products, guide, follow=True).weights.tolist() == pytest.approx([1.0, 0.0])


def test_between_opposite_gradients_only_standing_still_hurts_none():
    products, guide = of([2.0, 1.0], [-2.0, -1.0])
    found = guided_descent(products, guide, follow=False)
    assert found.weights.tolist() == pytest.approx([0.5, 0.5])
    assert float(found.weights @ products @ found.weights) == pytest.approx(0.0, abs=1e-12)


def test_if_every_objective_opposes_the_guide_following_it_is_still_a_descent():
    products, guide = of([1.0, 0.2], [1.0, -0.3], guide=[-1.0, 0.0])
    found = guided_descent(products, guide, follow=True)
    assert (products @ found.weights >= -1e-9).all() and not found.dropped


def test_when_nothing_moves_any_weights_will_do():
    found = guided_descent(torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), follow=False)
    assert on_simplex(found.weights)


def test_if_the_solver_fails_weights_are_uniform_and_that_is_said(monkeypatch):
    monkeypatch.setattr("transfuse.core.solvers._simplex_maximum", lambda *_: None)
    found = guided_descent(*problem(0), follow=False)
    assert found.weights.tolist() == pytest.approx([1 / 3] * 3) and found.dropped == 2


def test_bad_problems_are_refused():
    with pytest.raises(ValueError, match="m >= 2 objectives"):
        guided_descent(torch.ones(1, 1), torch.ones(1), follow=True)
    with pytest.raises(ValueError, match="guide"):
        guided_descent(torch.eye(3), torch.ones(2), follow=True)


def test_without_scipy_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingExtraError, match="scipy"):
        guided_descent(*problem(0), follow=False)


def test_the_shortest_vector_of_two_gradients_has_its_closed_form():
    for seed in range(20):
        products, _ = problem(seed, objectives=2)
        (aa, ab), (_, bb) = products.tolist()
        first = min(max((bb - ab) / (aa + bb - 2 * ab), 0.0), 1.0)
        assert shortest(products).tolist() == pytest.approx([first, 1 - first], abs=1e-6)


def test_the_shortest_vector_raises_no_objective_and_no_other_mixture_is_shorter():
    draw = torch.Generator().manual_seed(1)
    others = torch.rand(200, 4, generator=draw, dtype=torch.float64).exponential_(generator=draw)
    others = others / others.sum(1, keepdim=True)
    for seed in range(20):
        products, _ = problem(seed, objectives=4, width=3)
        found = shortest(products)
        length = found @ products @ found
        assert on_simplex(found)
        assert (products @ found >= length - 1e-6).all()
        assert ((others @ products * others).sum(1) >= length - 1e-8).all()


def test_gradients_without_conflict_are_simply_added():
    products, _ = of([1.0, 0.5], [0.2, 1.0])
    assert without_conflicts(products).tolist() == [1.0, 1.0]


def test_two_conflicting_gradients_are_projected_on_each_others_normal_planes():
    a, b = torch.tensor([1.0, 0.0]).double(), torch.tensor([-1.0, 1.0]).double()
    found = without_conflicts(torch.stack([a, b]) @ torch.stack([a, b]).T)
    expected = (a - (a @ b) / (b @ b) * b) + (b - (a @ b) / (a @ a) * a)
    assert torch.allclose(found[0] * a + found[1] * b, expected)


def test_the_order_of_projections_comes_from_the_generator_alone():
    products, _ = problem(3, objectives=5, width=3)
    one, same, other = (without_conflicts(products, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_descent_step_hurts_neither_of_two_quadratics_where_equal_weights_hurt_one():
    """f1 = |x|^2 / 2 and f2 = 9/2 |x - (1, 0)|^2: near the second's minimum the first's gradient loses against it."""
    x, centre = torch.tensor([0.5, 0.3]).double(), torch.tensor([1.0, 0.0]).double()
    rows = torch.stack([x, 9 * (x - centre)])

    def values(at: Tensor) -> Tensor:
        return torch.stack([at @ at / 2, 9 * (at - centre) @ (at - centre) / 2])

    products = rows @ rows.T
    found = guided_descent(products, torch.zeros(2).double(), follow=False).weights
    for weights, hurt in ((torch.full((2,), 0.5).double(), True), (found, False)):
        change = values(x - 1e-3 * (weights @ rows)) - values(x)
        assert (change.max() > 1e-6) == hurt
        assert change.min() < 0

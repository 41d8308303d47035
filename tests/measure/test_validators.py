"""Validators without labels: what they must value, closed forms, and estimates that are right on average."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from transfuse.core.errors import InputError, ShapeError
from transfuse.measure.validators import (
    VALIDATORS,
    certainty,
    deep_embedded_risk,
    density_ratio,
    importance_weighted_risk,
    mutual_information,
    soft_neighbourhood_density,
)


def logits(rows: int = 30, classes: int = 3, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def clustered(certain: float) -> Tensor:
    """Thirty predictions in three equal groups."""
    return certain * torch.eye(3).repeat(10, 1)


@pytest.mark.parametrize("name", VALIDATORS)
def test_every_validator_prefers_clear_groups_to_confusion(name):
    score = VALIDATORS[name]
    assert score(clustered(8.0)) > score(logits(scale=0.5)) or name == "soft_neighbourhood_density"
    assert isinstance(score(logits()), float)


def test_the_bounds_are_reached():
    assert certainty(torch.zeros(4, 3)) == pytest.approx(0.0)
    assert certainty(clustered(200.0)) == pytest.approx(1.0)
    assert mutual_information(clustered(200.0)) == pytest.approx(math.log(3))
    assert mutual_information(torch.zeros(4, 3)) == pytest.approx(0.0)
    assert soft_neighbourhood_density(torch.zeros(7, 3)) == pytest.approx(math.log(6))


def test_certainty_alone_is_fooled_by_a_collapse_and_information_is_not():
    collapsed = torch.zeros(30, 3)
    collapsed[:, 0] = 50.0
    assert certainty(collapsed) == pytest.approx(certainty(clustered(50.0)))
    assert mutual_information(collapsed) == pytest.approx(0.0, abs=1e-6)


def test_neighbourhood_density_is_the_entropy_of_similarities_without_oneself():
    points, temperature = logits(6), 0.2
    p = [[math.exp(x) / sum(math.exp(y) for y in row) for x in row] for row in points.double().tolist()]
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in p]
    total = 0.0
    for i, row in enumerate(unit):
        similar = [
            sum(a * b for a, b in zip(row, other, strict=True)) / temperature for j, other in enumerate(unit) if j != i
        ]
        weights = [math.exp(s) / sum(math.exp(t) for t in similar) for s in similar]
        total -= sum(w * math.log(w) for w in weights)
    assert soft_neighbourhood_density(points, temperature) == pytest.approx(total / 6)


def test_neighbourhood_density_is_high_in_dense_groups_and_low_among_scattered_points():
    scattered = 6 * torch.eye(12)
    assert soft_neighbourhood_density(6 * torch.eye(3).repeat(4, 1)) < math.log(11)
    groups = torch.cat([8 * torch.eye(12)[:2].repeat_interleave(6, 0)])
    assert soft_neighbourhood_density(groups) == pytest.approx(math.log(5), abs=0.01)
    half_scattered = torch.cat([scattered[:4], scattered[:4] * 0.3])
    assert soft_neighbourhood_density(half_scattered) < soft_neighbourhood_density(scattered[:2].repeat(4, 1))


def test_neighbourhood_density_does_not_depend_on_how_rows_are_cut(monkeypatch):
    points = logits(25)
    whole = soft_neighbourhood_density(points)
    monkeypatch.setattr("transfuse.measure.validators.ROWS", 4)
    assert soft_neighbourhood_density(points) == pytest.approx(whole)


def test_the_density_ratio_is_that_of_two_gaussians():
    draw = torch.Generator().manual_seed(0)
    source, target = torch.randn(4000, 1, generator=draw), torch.randn(2000, 1, generator=draw) + 1
    at = torch.linspace(-1, 2, 7)[:, None]
    exact = (at[:, 0] - 0.5).exp()  # N(1, 1) / N(0, 1)
    found = density_ratio(source, target, at, decay=0.0)
    assert torch.allclose(found.float(), exact, rtol=0.15)
    assert float(density_ratio(source, target, source).mean()) == pytest.approx(1.0, abs=0.1)


def shifted_risks(seed: int) -> tuple[float, float, float, float]:
    """The mean of x^2 under N(1, 1), which is 2, estimated from N(0, 1) with the exact ratio and without."""
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)).double()
    weights, values = (x - 0.5).exp(), x.square()
    return float(values.mean()), importance_weighted_risk(values, weights), deep_embedded_risk(values, weights), 2.0


def test_weighted_risks_are_those_of_the_target_and_the_control_variate_steadies_them():
    plain, weighted, steadied, true = (
        torch.tensor(c) for c in zip(*(shifted_risks(s) for s in range(300)), strict=True)
    )
    assert float(plain.mean()) == pytest.approx(1.0, abs=0.05)
    assert float(weighted.mean()) == pytest.approx(float(true[0]), abs=0.1)
    assert float(steadied.mean()) == pytest.approx(float(true[0]), abs=0.25)
    assert steadied.var() < weighted.var()


def test_equal_weights_are_no_weights():
    values = torch.tensor([1.0, 2.0, 6.0])
    for risk in (importance_weighted_risk, deep_embedded_risk):
        assert risk(values, torch.ones(3)) == pytest.approx(3.0)


def test_a_constant_loss_is_itself_whatever_the_weights_with_the_control_variate():
    weights = torch.tensor([0.1, 0.7, 3.0])
    assert deep_embedded_risk(torch.full((3,), 0.4), weights) == pytest.approx(0.4)


def test_bad_inputs_are_refused():
    for score in VALIDATORS.values():
        with pytest.raises(ShapeError):
            score(torch.zeros(3))
        with pytest.raises(InputError):
            score(torch.full((3, 2), torch.nan))
    with pytest.raises(InputError, match="two samples"):
        soft_neighbourhood_density(torch.zeros(1, 3))
    with pytest.raises(InputError, match="temperature"):
        soft_neighbourhood_density(torch.zeros(4, 3), 0.0)
    with pytest.raises(ShapeError, match="one width"):
        density_ratio(torch.zeros(3, 2), torch.zeros(3, 4), torch.zeros(3, 2))
    with pytest.raises(ShapeError, match="one weight per value"):
        importance_weighted_risk(torch.zeros(3), torch.zeros(2))


def test_nothing_is_changed_and_no_random_number_is_drawn():
    points, state = logits().requires_grad_(), torch.get_rng_state()
    for score in VALIDATORS.values():
        with torch.no_grad():
            score(points)
    with torch.no_grad():
        density_ratio(points, points + 1, points)
    assert torch.equal(state, torch.get_rng_state()) and points.grad is None

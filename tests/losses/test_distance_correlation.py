"""Distance correlation against sums written from its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from transfuse.losses import distance_correlation, u_centred, u_correlation, u_product, u_removed


def rows(n: int = 9, width: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y, Z = rows(seed=0), rows(width=7, seed=1), rows(width=2, seed=2)


def distances(x: Tensor) -> list[list[float]]:
    return [[math.sqrt(sum((float(a) - float(b)) ** 2 for a, b in zip(p, q, strict=True))) for q in x] for p in x]


def centred_by_loops(x: Tensor) -> Tensor:
    d, n = distances(x), len(x)
    total = sum(map(sum, d))
    return torch.tensor(
        [
            [
                0.0
                if i == j
                else d[i][j]
                - sum(d[k][j] for k in range(n)) / (n - 2)
                - sum(d[i]) / (n - 2)
                + total / ((n - 1) * (n - 2))
                for j in range(n)
            ]
            for i in range(n)
        ],
        dtype=torch.float64,
    )


def test_u_centring_agrees_with_loops() -> None:
    assert torch.allclose(u_centred(X), centred_by_loops(X), atol=1e-12)
    expected = sum(
        float(a * b) for a, b in zip(centred_by_loops(X).flatten(), centred_by_loops(Y).flatten(), strict=True)
    )
    assert u_product(u_centred(X), u_centred(Y)).item() == pytest.approx(expected / (9 * 6), abs=1e-8)


def test_rows_add_up_to_zero() -> None:
    assert u_centred(X).sum(dim=1).abs().max() < 1e-12


def test_a_set_of_points_correlates_perfectly_with_itself_turned_moved_and_scaled() -> None:
    turn = torch.linalg.qr(rows(4, 4, seed=3))[0]
    assert u_correlation(u_centred(X), u_centred(X)).item() == pytest.approx(1)
    assert u_correlation(u_centred(X), u_centred(3 * X @ turn + 5)).item() == pytest.approx(1)
    assert distance_correlation(X, 3 * X @ turn + 5).item() == pytest.approx(1, abs=1e-8)
    one = u_correlation(u_centred(X), u_centred(Y))
    assert torch.allclose(one, u_correlation(u_centred(0.1 * X @ turn), u_centred(Y)))


def test_what_is_left_is_at_a_right_angle_to_what_was_removed() -> None:
    p, q = u_centred(X), u_centred(Y)
    left = u_removed(p, q)
    assert u_product(left, q).abs() < 1e-6
    assert torch.allclose(left + u_product(p, q) / u_product(q, q) * q, p)


def test_nothing_is_left_of_a_thing_without_itself() -> None:
    for x in (X, X.float()):
        left = u_removed(u_centred(x), u_centred(x))
        assert left.abs().max() == 0
        assert u_correlation(left, u_centred(Y.to(x.dtype))) == 0


def test_all_is_left_where_the_other_is_constant() -> None:
    constant = u_centred(torch.ones(9, 3, dtype=torch.float64))
    assert constant.abs().max() == 0
    assert u_removed(u_centred(X), constant).equal(u_centred(X))


def test_independent_features_have_a_product_of_zero_on_average_and_the_biased_one_does_not() -> None:
    draws = [(rows(12, 3, seed=2 * i), rows(12, 3, seed=2 * i + 1)) for i in range(500)]
    products = torch.stack([u_product(u_centred(a), u_centred(b)) for a, b in draws])
    error = products.std() / math.sqrt(len(draws))
    assert products.mean().abs() < 3 * error
    biased = torch.stack([distance_correlation(a, b) for a, b in draws])
    assert biased.mean() > 20 * biased.std() / math.sqrt(len(draws))


def test_biased_correlation_agrees_with_its_definition() -> None:
    def centred(x: Tensor) -> Tensor:
        d = torch.tensor(distances(x), dtype=torch.float64)
        return d - d.mean(0, keepdim=True) - d.mean(1, keepdim=True) + d.mean()

    a, b = centred(X), centred(Y)
    expected = (a * b).mean() / ((a * a).mean() * (b * b).mean()).sqrt()
    assert distance_correlation(X, Y).item() == pytest.approx(expected.item(), abs=1e-9)


def test_gradients_are_right_and_finite_where_rows_coincide() -> None:
    x = rows(6, 3, seed=5).requires_grad_()
    classes = u_centred(Z[:6])

    def objective(x: Tensor) -> Tensor:
        return u_correlation(u_removed(u_centred(x), u_centred(Y[:6])), classes)

    assert torch.autograd.gradcheck(objective, x)
    assert torch.autograd.gradcheck(lambda x: distance_correlation(x, Y[:6]), x)
    doubled = torch.cat([x[:3], x[:3]]).detach().requires_grad_()
    objective(doubled).backward()
    assert doubled.grad.isfinite().all() and doubled.grad.abs().max() > 0


@pytest.mark.parametrize("wrong", [torch.ones(3, 2), torch.ones(5)])
def test_too_few_samples_are_refused(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="4 samples or more"):
        u_centred(wrong)
    with pytest.raises(ValueError, match="of the same samples"):
        distance_correlation(torch.ones(3, 2), torch.ones(4, 2))

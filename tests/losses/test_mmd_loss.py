from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from transfuse.losses import mmd


def sample(rows: int, width: int = 3, mean: float = 0.0, seed: int = 0) -> Tensor:
    return mean + torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looped(source: Tensor, target: Tensor, kernels: int, unbiased: bool) -> float:
    s, t = source.tolist(), target.tolist()
    pairs = list(itertools.permutations(s + t, 2))
    bandwidth = sum(math.dist(a, b) ** 2 for a, b in pairs) / len(pairs)

    def kernel(a: list[float], b: list[float]) -> float:
        widths = [2.0 ** (i - kernels // 2) * bandwidth for i in range(kernels)]
        return sum(math.exp(-(math.dist(a, b) ** 2) / w) for w in widths) / kernels

    def mean(rows: list[list[float]]) -> float:
        found = [
            kernel(a, b) for (i, a), (j, b) in itertools.product(enumerate(rows), repeat=2) if i != j or not unbiased
        ]
        return sum(found) / len(found)

    across = [kernel(a, b) for a, b in itertools.product(s, t)]
    return mean(s) + mean(t) - 2 * sum(across) / len(across)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kernels", [1, 2, 5])
def test_equals_a_loop_written_from_the_formula(kernels: int, unbiased: bool):
    source, target = sample(5), sample(4, mean=1.0, seed=1)
    expected = looped(source, target, kernels, unbiased)
    assert mmd(source, target, kernels=kernels, unbiased=unbiased).item() == pytest.approx(expected, rel=1e-9)


def test_the_biased_estimate_is_zero_between_equal_samples_and_never_negative():
    for seed in range(30):
        rows = sample(6, seed=seed).float()
        assert mmd(rows, rows).item() == pytest.approx(0.0, abs=1e-6)
        assert mmd(rows, rows[torch.randperm(6)]).item() >= 0.0
        assert mmd(rows, sample(9, seed=seed + 100).float()).item() > 0.0
    assert mmd(torch.ones(3, 2), torch.ones(4, 2)).item() == 0.0


def test_the_unbiased_estimate_may_be_negative_and_is_zero_on_average():
    draw = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 8, 3, generator=draw, dtype=torch.float64).unbind() for _ in range(400)]
    unbiased, biased = (torch.stack([mmd(s, t, unbiased=u) for s, t in pairs]) for u in (True, False))
    error = float(unbiased.std()) / math.sqrt(len(pairs))
    assert unbiased.min() < 0
    assert abs(float(unbiased.mean())) < 3 * error
    assert float(biased.mean()) > 10 * error


@pytest.mark.parametrize("unbiased", [False, True])
def test_grows_with_the_shift_and_does_not_depend_on_roles_scale_or_position(unbiased: bool):
    source, target = sample(40), sample(30, seed=1)
    values = [mmd(source, target + shift, unbiased=unbiased).item() for shift in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values) and values[-1] > values[0] + 0.2
    value = mmd(source, target + 1, unbiased=unbiased).item()
    assert mmd(target + 1, source, unbiased=unbiased).item() == pytest.approx(value)
    moved = mmd(7 * source + 3, 7 * (target + 1) + 3, unbiased=unbiased).item()
    assert moved == pytest.approx(value)


def test_it_sees_a_difference_that_no_mean_shows():
    narrow, wide = sample(200), 3 * sample(200, seed=1)
    wide = wide - wide.mean(0) + narrow.mean(0)
    assert mmd(narrow, wide).item() > 10 * mmd(narrow, sample(200, seed=2)).item()


def test_gradients_move_the_samples_together_and_are_finite_where_rows_coincide():
    target = sample(20, mean=2.0, seed=1).float()
    source = sample(20).float().requires_grad_()
    before = mmd(source, target)
    before.backward()
    assert source.grad is not None
    assert mmd(source.detach() - 0.5 * source.grad / source.grad.norm(), target) < before
    same = torch.ones(3, 2, requires_grad=True)
    mmd(same, torch.ones(3, 2)).backward()
    assert same.grad is not None and same.grad.isfinite().all()


def test_swapped_or_unequal_features_are_refused():
    with pytest.raises(ValueError, match="two samples of one feature"):
        mmd(sample(5, 3), sample(5, 4))
    with pytest.raises(ValueError, match="two samples of one feature"):
        mmd(torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match=r"needs 2 sample\(s\)"):
        mmd(sample(1), sample(5), unbiased=True)
    with pytest.raises(ValueError, match=r"needs 1 sample\(s\)"):
        mmd(sample(0), sample(5))

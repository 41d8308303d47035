"""Noise as a source: what is drawn, and that a seed draws it again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from transfuse.core.errors import InputError
from transfuse.datasets import Splits, load, noise, noise_sweep, permuted_classes
from transfuse.losses import IGNORE


def parts(splits: Splits) -> tuple[Tensor, Tensor]:
    assert isinstance(splits.train, TensorDataset)
    inputs, labels = splits.train.tensors
    return inputs, labels


def means(splits: Splits) -> Tensor:
    inputs, labels = parts(splits)
    return torch.stack([inputs[labels == k].mean(0) for k in labels.unique()])


@pytest.mark.parametrize("distribution", ["gaussian", "shared gaussian", "uniform", "laplace"])
def test_a_seed_draws_the_same_and_another_seed_does_not(distribution):
    one, again, other = (parts(noise(distribution, seed=s))[0] for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_sizes_are_those_asked_for():
    inputs, labels = parts(load("noise", classes=6, per_class=7, width=300))
    assert inputs.shape == (42, 300)
    assert labels.bincount().tolist() == [7] * 6


def test_gaussian_classes_lie_apart_by_the_distance_of_two_standard_normal_means():
    distances = torch.pdist(means(noise("gaussian", per_class=400)))
    assert distances.mean() == pytest.approx((2 * 256) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    ("distribution", "spread"), [("shared gaussian", 1.0), ("uniform", 20 / 12**0.5), ("laplace", 2**0.5)]
)
def test_other_noise_has_the_same_distribution_in_every_class(distribution, spread):
    splits = noise(distribution, per_class=400)
    inputs, _ = parts(splits)
    assert (inputs - inputs.mean(0)).std() == pytest.approx(spread, rel=0.02)
    expected = spread * (2 * 256 / 400) ** 0.5  # of two means of 400 draws
    assert torch.pdist(means(splits)).mean() == pytest.approx(expected, rel=0.1)


def test_uniform_noise_fills_its_interval():
    inputs, _ = parts(noise("uniform"))
    assert -10 <= inputs.min() < -9.9
    assert 9.9 < inputs.max() <= 10


def test_distance_of_classes_grows_linearly_with_alpha():
    distances = [torch.pdist(means(noise_sweep(alpha))).mean().item() for alpha in (0.5, 1.0, 2.0, 4.0)]
    for doubled, distance in zip(distances[1:], distances, strict=False):
        assert doubled / distance == pytest.approx(2.0, rel=0.1)


def test_the_sweep_has_classes_of_100_to_1000_samples_that_spread_with_their_number():
    inputs, labels = parts(noise_sweep(1.0, seed=3))
    counts = labels.bincount()
    assert counts.min() >= 100 and counts.max() <= 1000 and len(counts.unique()) > 1
    spreads = torch.stack([(inputs[labels == k] - inputs[labels == k].mean(0)).square().mean() for k in range(10)])
    assert torch.allclose(spreads / spreads[0], torch.arange(1.0, 11.0), rtol=0.15)


def test_renamed_classes_are_a_bijection_without_fixed_points():
    data = noise(classes=5, per_class=4).train
    assert isinstance(data, TensorDataset)
    inputs, labels = data.tensors
    renamed = permuted_classes(data, seed=1)
    assert torch.equal(renamed.tensors[0], inputs)
    pairs = set(zip(labels.tolist(), renamed.tensors[1].tolist(), strict=True))
    assert len(pairs) == 5
    assert {new for _, new in pairs} == set(range(5))
    assert all(old != new for old, new in pairs)


def test_renaming_leaves_unlabelled_samples_unlabelled():
    labels = torch.tensor([0, IGNORE, 1])
    assert permuted_classes(TensorDataset(torch.zeros(3, 1), labels)).tensors[1].tolist() == [1, IGNORE, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise("gausian"), "did you mean 'gaussian'"),
        (lambda: noise(width=0), "width is 0"),
        (lambda: noise_sweep(0.0), "alpha is 0.0"),
        (lambda: permuted_classes(TensorDataset(torch.zeros(3, 1))), "TensorDataset"),
        (lambda: permuted_classes(TensorDataset(torch.zeros(2, 1), torch.zeros(2).long())), "at least two"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()

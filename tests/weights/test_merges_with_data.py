"""Merges that look at data, or keep a mask per task."""

from __future__ import annotations

import pytest
import torch
from helpers import CNN, images
from torch import nn
from torch.utils.data import TensorDataset

from transfuse import transfer
from transfuse.core.errors import InputError
from transfuse.weights import EMR, Fisher, GreedySoup, RegMean
from transfuse.weights.emr import elected_largest
from transfuse.weights.regmean import patches


def linear(seed: int, classes: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, classes))


def inputs(count: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=draw), torch.randint(3, (count,), generator=draw)


def merged(method, models, target, data, **options):
    return transfer(method, models, target, data, test=inputs(6, 9), batch_size=4, **options).model


# Fisher


def fisher_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of a linear softmax classifier in closed form: mean of p_c (1 - p_c)**2-like sums, by a loop over classes."""
    total = torch.zeros(3, 5)
    for row in x:
        p = model(row[None])[0].softmax(-1)
        for c in range(3):
            gradient = (torch.eye(3)[c] - p)[:, None] * row[None]
            total += p[c] * gradient.square()
    return (total / len(x)).detach()


def test_fisher_weighs_by_the_squared_gradients_of_every_class():
    models, (x, y) = [linear(1), linear(2)], inputs()
    found = merged(Fisher(), models, linear(0), (x, y))
    one, two = (fisher_of(model, x) for model in models)
    a, b = (model[0].weight for model in models)
    assert torch.allclose(found[0].weight, (one * a + two * b) / (one + two), atol=1e-5)
    weighted = merged(Fisher([3.0, 1.0]), models, linear(0), (x, y))
    assert torch.allclose(weighted[0].weight, (3 * one * a + two * b) / (3 * one + two), atol=1e-5)


def test_fisher_is_the_average_where_nobody_is_sure():
    models, (x, y) = [linear(1), linear(2)], inputs()
    x[:, 0] = 0
    found = merged(Fisher(), models, linear(0), (x, y))
    assert torch.allclose(found[0].weight[:, 0], (models[0][0].weight[:, 0] + models[1][0].weight[:, 0]) / 2)


# RegMean


def test_regmean_is_the_least_squares_solution():
    models, first, second = [linear(1), linear(2)], inputs(32), inputs(32, 1)
    found = merged(RegMean(1.0), models, linear(0), {"a": first, "b": second})
    x = torch.cat([first[0], second[0]])
    y = torch.cat([first[0] @ models[0][0].weight.T, second[0] @ models[1][0].weight.T])
    assert torch.allclose(found[0].weight, torch.linalg.lstsq(x, y).solution.T, atol=1e-3)
    assert torch.allclose(found[0].bias, (models[0][0].bias + models[1][0].bias) / 2)


def test_regmean_without_the_off_diagonal_weighs_by_the_size_of_inputs():
    models, data = [linear(1), linear(2)], inputs(32)
    other = (2 * data[0], data[1])
    found = merged(RegMean(0.0), models, linear(0), {"a": data, "b": other})
    assert torch.allclose(found[0].weight, (models[0][0].weight + 4 * models[1][0].weight) / 5, atol=1e-4)


def test_patches_of_a_convolution_are_what_it_multiplies():
    layer, x = nn.Conv2d(2, 3, 3, stride=2, padding=1), torch.randn(2, 2, 5, 5)
    expected = layer(x) - layer.bias[:, None, None]
    found = patches(layer, x) @ layer.weight.flatten(1).T
    assert torch.allclose(found.view(2, 9, 3).mT.reshape(expected.shape), expected, atol=1e-5)


def test_models_merged_with_themselves_stay_as_they_are():
    model = CNN(norm=True)
    copies = [CNN(norm=True), CNN(norm=True)]
    for method in (Fisher(), RegMean(), GreedySoup()):
        pictures, labels = images(8)
        data = TensorDataset(pictures, labels.clamp(min=0))
        found = transfer(method, copies, CNN(norm=True, seed=3), data, test=images(6), batch_size=4).model
        for key, value in found.state_dict().items():
            assert torch.allclose(value.float(), model.state_dict()[key].float(), atol=1e-3), (method, key)


# Soups


class Constant(nn.Module):
    """Says the same to everything: class `at` with a strength."""

    def __init__(self, *logits: float):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def test_a_greedy_soup_keeps_what_does_not_hurt():
    x, labels = torch.randn(8, 5), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    good, same, bad = Constant(3.0, 0.0, 0.0), Constant(1.0, 0.0, 0.0), Constant(0.0, 9.0, 0.0)
    options = {"test": (x, labels), "batch_size": 4}
    found = transfer(GreedySoup(), [bad, same, good], Constant(0.0, 0.0, 0.0), (x, labels), **options).model
    assert torch.allclose(found.logits, (good.logits + same.logits) / 2)
    with pytest.raises(InputError, match="no labels"):
        transfer(GreedySoup(), [good, bad], Constant(0.0, 0.0, 0.0), x, **options)


# EMR


def test_emr_by_hand():
    deltas = [torch.tensor([3.0, -2.0, 1.0]), torch.tensor([1.0, 4.0, -1.0])]
    assert elected_largest(deltas).tolist() == [3.0, 4.0, 1.0]
    base, models = Constant(0.0, 0.0, 0.0), [Constant(3.0, -2.0, 1.0), Constant(1.0, 4.0, -1.0)]
    result = transfer(EMR(), models, base, None, test={"a": inputs(4), "b": inputs(4)})
    x = torch.zeros(1, 5)
    first, second = (result.model(x, task=task)[0] for task in (0, 1))
    scale = (3 + 2 + 1) / (3 + 1)
    assert first.tolist() == pytest.approx([3 * scale, 0.0, 1 * scale])
    scale = (1 + 4 + 1) / (3 + 4)
    assert second.tolist() == pytest.approx([3 * scale, 4 * scale, 0.0])


def test_one_task_is_kept_exactly_by_emr():
    base, model = CNN(seed=0), CNN(seed=1)
    found = transfer(EMR(), [model], base, None, test=images(6)).model
    pictures = images(4)[0]
    assert torch.allclose(found(pictures), model(pictures), atol=1e-5)


def test_wrong_arguments_are_refused():
    with pytest.raises(InputError, match="off_diagonal is 2"):
        RegMean(2.0)
    with pytest.raises(InputError, match="one data set, or one for each of 3 models; found 2"):
        merged(RegMean(), [linear(1), linear(2), linear(3)], linear(0), {"a": inputs(), "b": inputs()})

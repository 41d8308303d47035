"""Class means and their alignment: closed forms, limits, symmetries, a float64 loop, gradients, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from transfuse.losses import IGNORE, class_means, mean_alignment, soft_labels


def drawn(seed: int = 0, samples: int = 12, width: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    weights = torch.rand(samples, classes, generator=draw).softmax(1)
    return torch.randn(samples, width, generator=draw), weights


def one_hot(labels: list[int], classes: int) -> Tensor:
    return F.one_hot(torch.tensor(labels), classes).float()


def test_hard_weights_give_the_means_of_the_classes():
    features = torch.tensor([[1.0], [3.0], [10.0]])
    assert class_means(features, one_hot([0, 0, 1], 2)).tolist() == [[2.0], [10.0]]


def test_a_class_without_weight_has_its_mean_at_the_origin_and_a_finite_gradient():
    features = torch.ones(2, 3, requires_grad=True)
    means = class_means(features, one_hot([0, 0], 2))
    means.sum().backward()
    assert means[1].tolist() == [0.0, 0.0, 0.0]
    assert features.grad is not None and features.grad.isfinite().all()


def test_labelled_rows_are_one_hot_and_the_others_are_probabilities():
    logits = torch.tensor([[5.0, 0.0], [0.0, 0.0]], requires_grad=True)
    found = soft_labels(logits, torch.tensor([1, IGNORE]))
    assert torch.equal(found.detach(), torch.tensor([[0.0, 1.0], [0.5, 0.5]]))
    found[:, 0].sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == [0.0, 0.0]
    assert logits.grad[1].abs().sum() > 0


def test_two_classes_of_points_on_a_line_by_hand():
    source, target = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0], [3.0]])
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75]])
    # means 1 and 3; class 0: 0 and (1 + 0.75) / 1.25 = 1.4; class 1: 2 and (5 + 2.25) / 1.75 = 29/7
    by_hand = ((1 - 3) ** 2 + 1.4**2 + (2 - 29 / 7) ** 2) / 3
    assert mean_alignment(source, one_hot([0, 1], 2), target, weights).item() == pytest.approx(by_hand, abs=1e-6)


def test_is_zero_where_both_domains_are_the_same_set_with_the_same_labels():
    features, _ = drawn()
    weights = one_hot([0, 1, 2] * 4, 3)
    assert mean_alignment(features, weights, features.clone(), weights).item() == 0.0
    assert mean_alignment(features, weights, features + 0.1, weights).item() > 1e-3


def test_agrees_with_a_float64_loop_written_from_the_formula():
    source, source_weights = drawn(0)
    target, target_weights = drawn(1, samples=7)

    def mean(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return sum(wi * xi for wi, xi in zip(w, x, strict=True)) / w.sum()

    s, sw, t, tw = (v.double().numpy() for v in (source, source_weights, target, target_weights))
    total = ((s.mean(0) - t.mean(0)) ** 2).sum()
    for k in range(3):
        total += ((mean(s, sw[:, k]) - mean(t, tw[:, k])) ** 2).sum()
    found = mean_alignment(source, source_weights, target, target_weights)
    assert found.item() == pytest.approx(total / 4, rel=1e-5)


def test_naming_the_classes_otherwise_on_both_sides_changes_nothing():
    (source, source_weights), (target, target_weights) = drawn(0), drawn(1)
    order = torch.tensor([2, 0, 1])
    plain = mean_alignment(source, source_weights, target, target_weights)
    renamed = mean_alignment(source, source_weights[:, order], target, target_weights[:, order])
    assert renamed.item() == pytest.approx(plain.item(), rel=1e-6)


def test_gradients_are_those_of_finite_differences():
    (source, source_weights), (target, target_weights) = drawn(0), drawn(1)
    inputs = [v.double().requires_grad_() for v in (source, source_weights, target, target_weights)]
    assert torch.autograd.gradcheck(mean_alignment, inputs)


def test_half_precision_is_computed_in_float32():
    (source, source_weights), (target, target_weights) = drawn(0), drawn(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = mean_alignment(source, source_weights, target, target_weights)
    assert found.dtype == torch.float32
    assert torch.equal(found, mean_alignment(source, source_weights, target, target_weights))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, sw, t, tw: (s[:, :-1], sw, t, tw), "must agree in features and in classes"),
        (lambda s, sw, t, tw: (s, sw[:, :-1], t, tw), "must agree in features and in classes"),
        (lambda s, sw, t, tw: (s[:-1], sw, t, tw), "of the same samples"),
        (lambda s, sw, t, tw: (s, sw * torch.tensor([1.0, 0.0, 1.0]), t, tw), r"no sample of the classes \[1\]"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        mean_alignment(*change(*drawn(0), *drawn(1)))

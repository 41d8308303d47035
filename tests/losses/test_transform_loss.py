from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transfuse.losses import kl_divergence, top_k_linspace, top_k_scaling


def logits(rows: int = 6, classes: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looped(row: list[float], label: int | None, k: int, growth: float, correction: float, shift: float) -> list[float]:
    order = sorted(range(len(row)), key=lambda i: -row[i])
    top, rest = order[:k], order[k:]
    delta = shift * (sum(row[i] for i in top) / k - sum(row[i] for i in rest) / len(rest))
    weights = {i: 1 + growth * (k - rank + 1) / k for rank, i in enumerate(top, start=1)}
    if label is not None and label != order[0]:
        weights[label] = (1 + growth) * correction
    return [
        (z * weights[i] if z >= 0 else z / weights[i]) + delta if i in weights else z for i, z in enumerate(row)
    ]  # fmt: skip


@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("settings", [(0.5, 1.5, 0.1), (1.0, 1.0, 0.0), (0.0, 2.0, 0.3)])
def test_equals_a_loop_written_from_the_formula(k, settings):
    rows, labels = logits(), torch.tensor([0, 1, 2, 3, -100, 5])
    found = top_k_scaling(rows, labels, k=k, growth=settings[0], correction=settings[1], shift=settings[2])
    for values, row, label in zip(found, rows.tolist(), labels.tolist(), strict=True):
        assert values.tolist() == pytest.approx(looped(row, None if label < 0 else label, k, *settings))


def test_is_the_identity_without_growth_shift_and_correction():
    assert torch.equal(top_k_scaling(logits(), torch.arange(6), growth=0, shift=0, correction=1), logits())


def test_leaves_every_other_class_bit_exact():
    rows = logits()
    changed = top_k_scaling(rows, k=3) != rows
    assert (changed.sum(1) == 3).all()
    assert torch.equal(changed, torch.zeros_like(changed).scatter(1, rows.topk(3).indices, True))


def test_does_not_depend_on_the_order_of_the_classes():
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(6)
    permuted = top_k_scaling(logits()[:, order], order.argsort()[labels])
    assert torch.equal(permuted, top_k_scaling(logits(), labels)[:, order])


def test_raises_the_true_class_where_the_teacher_misses_it_and_only_there():
    rows, labels = logits(50), torch.randint(10, (50,), generator=torch.Generator().manual_seed(3))
    scaled, plain = top_k_scaling(rows, labels), top_k_scaling(rows)
    missed = rows.argmax(1) != labels
    truth = labels[:, None]
    assert 0 < missed.sum() < 50
    assert (scaled.gather(1, truth) > rows.gather(1, truth))[missed].all()
    assert torch.equal(scaled[~missed], plain[~missed])


def test_the_largest_stay_in_order_and_their_gaps_grow_where_positive():
    rows = logits().abs() + 0.1
    before, after = rows.sort(descending=True).values[:, :3], top_k_scaling(rows).sort(descending=True).values[:, :3]
    assert torch.equal(rows.topk(3).indices, top_k_scaling(rows).topk(3).indices)
    assert (after.diff() < before.diff()).all()


def test_a_negative_logit_is_not_pushed_down():
    rows = -logits().abs() - 0.1
    assert (top_k_scaling(rows, shift=0) >= rows).all()
    assert torch.equal(rows.topk(3).indices, top_k_scaling(rows, shift=0).topk(3).indices)


def test_unlabelled_rows_are_scaled_and_not_corrected():
    assert torch.equal(top_k_scaling(logits(), torch.full((6,), -100)), top_k_scaling(logits()))


def test_takes_rows_of_any_shape():
    rows, labels = logits(6).view(2, 3, 10), torch.arange(6).view(2, 3)
    assert torch.equal(top_k_scaling(rows, labels).view(6, 10), top_k_scaling(rows.view(6, 10), labels.view(6)))


def test_stands_in_front_of_any_loss_on_logits():
    student = logits(seed=1).requires_grad_()
    kl_divergence(student, top_k_scaling(logits(), torch.arange(6)), temperature=4).sum().backward()
    assert student.grad.abs().max() > 0


def test_linspace_multiplies_by_weights_from_two_to_one_whatever_the_sign():
    row = torch.tensor([[-1.0, 5.0, -2.0, 3.0, -4.0]])
    assert top_k_linspace(row, k=3).tolist() == [[-1.0, 10.0, -2.0, 4.5, -4.0]]
    assert top_k_linspace(-row, k=3).tolist() == [[1.0, -5.0, 3.0, -3.0, 8.0]]


@pytest.mark.parametrize("scale", [top_k_scaling, top_k_linspace])
@pytest.mark.parametrize("k", [0, 10])
def test_refuses_a_k_that_leaves_nothing(scale, k):
    with pytest.raises(ValueError, match=f"k must be between 1 and 9 for 10 classes, found {k}"):
        scale(logits(), k=k)


def test_refuses_labels_that_are_not_one_per_row():
    with pytest.raises(ValueError, match=r"logits \(6, 10\) need labels \(6,\)"):
        top_k_scaling(logits(), torch.arange(5))

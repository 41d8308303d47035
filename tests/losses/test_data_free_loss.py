"""Losses on made images, against closed forms and loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from transfuse.losses import (
    agreeing_divergence,
    batch_norm_distance,
    category_contrast,
    clamped_jensen_shannon,
    kl_divergence,
    mean_absolute_error,
    variance_within_classes,
)

# Statistics of batch normalisation


def test_batch_norm_distance_is_zero_where_the_batch_has_the_running_statistics():
    images = torch.randn(8, 3, 2, 2, dtype=torch.float64)
    variance, mean = torch.var_mean(images, dim=(0, 2, 3), correction=0)
    assert batch_norm_distance([images], [mean], [variance]).item() == pytest.approx(0, abs=1e-12)


def test_batch_norm_distance_is_the_sum_of_two_norms_per_layer():
    one, two = torch.zeros(4, 2, 3, 3), torch.ones(4, 1)
    value = batch_norm_distance(
        [one, two], [torch.tensor([3.0, 4.0]), torch.tensor([1.5])], [torch.tensor([0.0, 2.0]), torch.tensor([0.0])]
    )
    assert value.item() == pytest.approx(5 + 2 + 0.5)


def test_batch_norm_distance_teaches_the_images_even_where_a_norm_is_zero():
    images = torch.randn(6, 2, 2, 2, requires_grad=True)
    layer = nn.BatchNorm2d(2)
    batch_norm_distance([images], [layer.running_mean], [layer.running_var]).backward()
    assert images.grad.abs().max() > 0
    constant = torch.zeros(4, 2, requires_grad=True)
    batch_norm_distance([constant], [torch.zeros(2)], [torch.zeros(2)]).backward()
    assert constant.grad.isfinite().all()


def test_batch_norm_distance_refuses_layers_that_do_not_belong_together():
    with pytest.raises(ValueError, match="inputs of 0 layers"):
        batch_norm_distance([], [], [])
    with pytest.raises(ValueError, match="has not the 3 channels"):
        batch_norm_distance([torch.zeros(2, 2)], [torch.zeros(3)], [torch.zeros(3)])


# Adversarial terms


def test_samples_on_which_student_and_teacher_disagree_contribute_exactly_nothing():
    student = torch.tensor([[2.0, 0.0], [0.0, 2.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    values = agreeing_divergence(student, teacher)
    assert values[1].item() == 0.0
    assert values[0].item() == pytest.approx(kl_divergence(student, teacher)[0].item())
    values.sum().backward()
    assert student.grad[1].eq(0).all() and student.grad[0].ne(0).any()


def test_clamped_jensen_shannon_is_zero_with_gradient_zero_where_student_equals_teacher():
    teacher = torch.randn(5, 4, dtype=torch.float64)
    student = teacher.clone().requires_grad_()
    value = clamped_jensen_shannon(student, teacher)
    value.backward()
    assert value.item() == 0.0
    assert student.grad.abs().max() < 1e-15


def test_clamped_jensen_shannon_agrees_with_a_loop():
    student, teacher = torch.randn(3, 4, dtype=torch.float64) * 9, torch.randn(3, 4, dtype=torch.float64) * 9
    total = 0.0
    for s, t in zip((student / 3).softmax(1).tolist(), (teacher / 3).softmax(1).tolist(), strict=True):
        for q, p in zip(s, t, strict=True):
            m, q, p = (min(max(x, 0.01), 0.99) for x in ((p + q) / 2, q, p))
            total += 0.5 * m * math.log(m / p) + 0.5 * m * math.log(m / q)
    assert clamped_jensen_shannon(student, teacher).item() == pytest.approx(total / 12)


def test_clamped_jensen_shannon_shrinks_with_the_number_of_classes():
    """It is averaged over classes: classes that nobody believes in only dilute it."""

    def value(extra: int) -> float:
        rest = torch.full((1, extra), -60.0)
        return clamped_jensen_shannon(
            *(torch.cat([x, rest], 1) for x in (torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]])))
        ).item()

    assert value(8) == pytest.approx(value(0) * 2 / 10, rel=1e-4)


# Collapse


def test_variance_within_classes_is_zero_for_one_image_per_class_and_one_for_classes_that_do_not_matter():
    classes = torch.tensor([0, 1, 2, 0, 1, 2])
    prototypes = torch.randn(3, 1, 4, 4)
    assert variance_within_classes(prototypes[classes], classes).item() == pytest.approx(0, abs=1e-6)
    assert variance_within_classes(torch.ones(6, 1, 2, 2), classes).item() == 0  # all images are one
    many = torch.randn(3000, 1, 4, 4)
    assert variance_within_classes(many, torch.arange(3000) % 3).item() == pytest.approx(1, abs=0.01)


def test_variance_within_classes_knows_nothing_of_classes_with_one_image_each():
    assert variance_within_classes(torch.randn(3, 1, 2, 2), torch.arange(3)).item() == 1
    few = torch.stack([variance_within_classes(torch.randn(12, 50), torch.arange(12) % 10) for _ in range(100)])
    assert few.mean().item() == pytest.approx(1, abs=0.05)  # unbiased with two images or one per class


# Contrast


def test_contrast_of_equal_features_with_one_positive_is_the_log_of_all_others():
    pairs = 5
    positives = torch.eye(2 * pairs, dtype=torch.bool).roll(pairs, 0)
    values = category_contrast(torch.ones(2 * pairs, 3), positives)
    assert torch.allclose(values, torch.full((10,), math.log(2 * pairs - 1)), atol=1e-5)


def test_contrast_does_not_depend_on_the_order_of_the_batch_or_the_length_of_features():
    features = torch.randn(8, 5, dtype=torch.float64)
    labels = torch.arange(8) % 3
    order = torch.randperm(8)

    def value(order: torch.Tensor, scale: float = 1.0) -> float:
        y = labels[order]
        return category_contrast(scale * features[order], y[:, None] == y).mean().item()

    assert value(order) == pytest.approx(value(torch.arange(8)))
    assert value(order, 7.0) == pytest.approx(value(order))


def test_contrast_agrees_with_a_loop_and_leaves_out_samples_without_positives():
    features = torch.randn(5, 3, dtype=torch.float64)
    labels = [0, 0, 1, 1, 2]
    positives = torch.tensor([[a == b for b in labels] for a in labels])
    h = [[x / math.sqrt(sum(v * v for v in row)) for x in row] for row in features.tolist()]
    expected = []
    for i in range(4):
        weights = [math.exp(sum(a * b for a, b in zip(h[i], h[j], strict=True)) / 0.5) for j in range(5)]
        close = sum(w for j, w in enumerate(weights) if j != i and labels[j] == labels[i])
        expected.append(-math.log(close / sum(w for j, w in enumerate(weights) if j != i)))
    assert category_contrast(features, positives, 0.5).tolist() == pytest.approx(expected)
    assert category_contrast(features, torch.zeros(5, 5, dtype=torch.bool)).shape == (0,)


def test_contrast_pulls_positives_together():
    features = torch.randn(6, 4, requires_grad=True)
    positives = (torch.arange(6) % 3)[:, None] == torch.arange(6) % 3
    before = category_contrast(features, positives).mean()
    (gradient,) = torch.autograd.grad(before, features)
    assert gradient.isfinite().all()
    assert category_contrast(features - 0.1 * gradient, positives).mean() < before


@pytest.mark.parametrize(("shape", "temperature"), [((3, 2), 0.1), ((4, 2), 0.0)])
def test_contrast_refuses_what_does_not_fit(shape, temperature):
    with pytest.raises(ValueError, match="expected|temperature"):
        category_contrast(torch.ones(shape), torch.ones(4, 4, dtype=torch.bool), temperature)


def test_mean_absolute_error_is_per_sample():
    values = mean_absolute_error(torch.tensor([[1.0, -1.0], [3.0, 0.0]]), torch.zeros(2, 2))
    assert values.tolist() == [1.0, 1.5]
    with pytest.raises(ValueError, match="equal shapes"):
        mean_absolute_error(torch.zeros(2, 2), torch.zeros(2, 3))

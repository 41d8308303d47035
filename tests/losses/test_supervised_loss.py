from __future__ import annotations

import itertools
import math

import pytest
import torch

from transfuse.losses import IGNORE, classes_last, cross_entropy, pseudo_labels

SHAPES = [((3, 5), (3,)), ((2, 3, 5), (2, 3)), ((2, 5, 2, 3), (2, 2, 3))]


@pytest.mark.parametrize(("shape", "label_shape"), SHAPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_a_loop_written_from_the_formula(
    shape: tuple[int, ...], label_shape: tuple[int, ...], smoothing: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, label_shape, generator=generator)
    labels.view(-1)[0] = IGNORE
    values = cross_entropy(logits, labels, label_smoothing=smoothing)

    assert values.shape == label_shape
    for position in itertools.product(*(range(size) for size in label_shape)):
        row, label = classes_last(logits)[position].tolist(), int(labels[position])
        log_sum = math.log(sum(map(math.exp, row)))
        target = [smoothing / 5 + (1 - smoothing) * (c == label) for c in range(5)]
        expected = sum(t * (log_sum - z) for t, z in zip(target, row, strict=True))
        assert values[position].item() == pytest.approx(0.0 if label == IGNORE else expected)


def test_ignored_labels_give_no_gradient() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    cross_entropy(logits, torch.tensor([IGNORE, 1])).sum().backward()
    assert logits.grad is not None
    assert not logits.grad[0].any()
    assert logits.grad[1].any()


def test_a_batch_without_any_label_is_zero() -> None:
    assert cross_entropy(torch.randn(2, 3), torch.full((2,), IGNORE)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_left_before_the_computation(dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))).to(dtype)
    labels = torch.tensor([0, 1, 2, 3])
    values = cross_entropy(logits, labels)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), cross_entropy(logits.double(), labels), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("labels", "found"), [([0, 3], r"0\.\.3"), ([-1, 2], r"-1\.\.2"), ([IGNORE, 7], r"7\.\.7")])
def test_refuses_labels_out_of_range_naming_range_and_classes(labels: list[int], found: str) -> None:
    with pytest.raises(ValueError, match=f"3 classes, found {found}"):
        cross_entropy(torch.zeros(2, 3), torch.tensor(labels))


def test_refuses_labels_that_do_not_fit_the_logits_naming_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 5, 3\).*\(2, 5\), found \(2, 3\)"):
        cross_entropy(torch.zeros(2, 5, 3), torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize(("shape", "label_shape"), SHAPES)
def test_gradients_equal_finite_differences(shape: tuple[int, ...], label_shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, label_shape)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, labels, label_smoothing=0.1), logits)


def test_a_pseudo_label_is_the_predicted_class_where_its_probability_is_above_the_threshold():
    logits = torch.tensor([[0.7, 0.3], [0.05, 0.95], [0.5, 0.5]]).log().requires_grad_()
    labels = pseudo_labels(logits, 0.69)
    assert labels.tolist() == [0, 1, IGNORE] and not labels.requires_grad
    assert pseudo_labels(logits, 0.95 + 1e-6).tolist() == [IGNORE] * 3
    maps = logits.T.reshape(1, 2, 1, 3)
    assert pseudo_labels(maps, 0.69).tolist() == [[[0, 1, IGNORE]]]

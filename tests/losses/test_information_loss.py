from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from transfuse.losses import entropy, marginal_entropy, mutual_information

COUPLED = pytest.mark.parametrize("loss", [marginal_entropy, mutual_information])


def predictions(rows: int = 7, classes: int = 4, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looped_entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def test_agrees_with_a_loop_written_from_the_formula():
    logits = predictions()
    p = logits.softmax(1).tolist()
    rows = [looped_entropy(row) for row in p]
    mean = [sum(column) / len(p) for column in zip(*p, strict=True)]
    assert entropy(logits).tolist() == pytest.approx(rows)
    assert marginal_entropy(logits).item() == pytest.approx(looped_entropy(mean))
    assert mutual_information(logits).item() == pytest.approx(looped_entropy(mean) - sum(rows) / len(rows))


def test_information_is_log_k_for_certain_balanced_predictions_and_0_for_equal_ones():
    certain = 200.0 * torch.eye(5).repeat(3, 1)
    assert mutual_information(certain).item() == pytest.approx(math.log(5), abs=1e-6)
    same = predictions(1).repeat(6, 1)
    assert mutual_information(same).item() == pytest.approx(0.0, abs=1e-12)
    collapsed = torch.zeros(6, 5)
    collapsed[:, 2] = 200.0
    assert mutual_information(collapsed).item() == pytest.approx(0.0, abs=1e-6)


def test_information_lies_between_0_and_log_k():
    for seed in range(20):
        value = mutual_information(predictions(seed=seed)).item()
        assert -1e-12 <= value <= math.log(4)


def test_logarithms_of_probabilities_are_logits_of_themselves():
    logits = predictions()
    for loss in (entropy, marginal_entropy, mutual_information):
        assert torch.allclose(loss(logits), loss(logits.log_softmax(1)))


@COUPLED
def test_does_not_depend_on_the_order_of_samples_or_classes(loss: Callable[[Tensor], Tensor]):
    logits = predictions()
    assert torch.allclose(loss(logits), loss(logits.flip(0)))
    assert torch.allclose(loss(logits), loss(logits.flip(1)))


def test_entropy_of_tokens_and_pixels_is_one_value_each():
    assert entropy(torch.randn(2, 5, 3)).shape == (2, 5)
    assert entropy(torch.randn(2, 3, 4, 6)).shape == (2, 4, 6)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e30])
@pytest.mark.parametrize("loss", [entropy, marginal_entropy, mutual_information])
def test_gradients_are_finite_where_probabilities_become_zero(loss: Callable[[Tensor], Tensor], scale: float):
    logits = (scale * predictions()).float().requires_grad_()
    impossible = torch.cat([logits, torch.full((7, 1), -torch.inf)], 1)
    loss(impossible).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert loss(impossible).isfinite().all()
    if scale == 1.0:
        assert logits.grad.abs().max() > 0


def test_gradients_are_those_of_the_formula():
    logits = predictions().requires_grad_()
    assert torch.autograd.gradcheck(entropy, logits)
    assert torch.autograd.gradcheck(mutual_information, logits)


@COUPLED
def test_what_is_no_set_of_predictions_is_refused(loss: Callable[[Tensor], Tensor]):
    for bad in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 3, 4)):
        with pytest.raises(ValueError, match=r"\(batch, classes\) with at least one row"):
            loss(bad)

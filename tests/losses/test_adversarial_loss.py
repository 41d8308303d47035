from __future__ import annotations

import math

import pytest
import torch

from transfuse.losses import domain_cross_entropy, reverse_gradient


def test_reversal_changes_no_value_and_turns_the_gradient_by_its_strength():
    x = torch.randn(4, 3, requires_grad=True)
    out = reverse_gradient(x, 0.3)
    assert torch.equal(out, x)
    upstream = torch.randn(4, 3)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    assert torch.equal(gradient, -0.3 * upstream)


def test_without_strength_nothing_comes_back():
    x = torch.randn(4, requires_grad=True)
    assert torch.autograd.grad(reverse_gradient(x, 0.0).sum(), x)[0].abs().max() == 0


@pytest.mark.parametrize("logit", [-3.0, 0.0, 2.0, 200.0, -200.0])
def test_cross_entropy_is_minus_the_log_probability_of_the_domain(logit):
    def log_probability(x: float) -> float:
        return -math.log1p(math.exp(-x)) if x > -30 else x

    values = torch.tensor([[logit]])
    assert domain_cross_entropy(values, target=True).item() == pytest.approx(-log_probability(logit), abs=1e-6)
    assert domain_cross_entropy(values, target=False).item() == pytest.approx(-log_probability(-logit), abs=1e-6)


def test_a_discriminator_that_cannot_tell_has_log_2_and_half_precision_becomes_full():
    for dtype in (torch.float16, torch.float32):
        found = domain_cross_entropy(torch.zeros(3, dtype=dtype), target=True)
        assert found.dtype == torch.float32 and found.tolist() == pytest.approx([math.log(2)] * 3)


def test_two_logits_per_sample_are_refused():
    with pytest.raises(ValueError, match="one logit per sample"):
        domain_cross_entropy(torch.zeros(3, 2), target=True)

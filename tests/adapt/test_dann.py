"""DANN: a game with one reversal, written as one loss."""

from __future__ import annotations

import math

import pytest
import torch
from domains import domains, source
from helpers import CNN, assert_equal_gradients, first_gradients, images
from torch import Tensor
from torch.nn import functional as F

from transfuse.adapt import DANN
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs


def outputs(rows: int, seed: int) -> Outputs:
    feature = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    return Outputs(torch.zeros(rows, 3), {"penultimate": feature})


def built(gamma: float = 10.0) -> DANN:
    torch.manual_seed(0)
    method = DANN(hidden=7, gamma=gamma)
    method.build(outputs(2, 0), outputs(2, 0))
    return method


def terms(method: DANN, here: Outputs, there: Outputs, fraction: float) -> dict[str, Tensor]:
    found = method.loss(here, there, None, None, Clock(step=round(100 * fraction), steps=100))
    return {name: term.mean for name, term in found.items()}


def test_the_loss_is_the_discriminators_cross_entropy_in_each_domain():
    method, here, there = built(), outputs(4, 1), outputs(6, 2)
    found = terms(method, here, there, 0.5)
    log_odds = [method.discriminator(o.features["penultimate"])[:, 0].double().tolist() for o in (here, there)]
    expected = [
        sum(math.log1p(math.exp(z)) for z in log_odds[0]) / 4,
        sum(math.log1p(math.exp(-z)) for z in log_odds[1]) / 6,
    ]
    assert [v.item() for v in found.values()] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_features_get_the_reversed_gradient_times_the_strength_and_the_discriminator_the_whole(fraction):
    method, here, there = built(), outputs(4, 1), outputs(4, 2)
    value = sum(terms(method, here, there, fraction).values())
    inner = list(method.discriminator.parameters())
    feature = here.features["penultimate"]
    reversed_, *own = torch.autograd.grad(value, [feature, *inner])
    plain = F.softplus(method.discriminator(feature)[:, 0]).mean()
    plain = plain + F.softplus(-method.discriminator(there.features["penultimate"])[:, 0]).mean()
    straight, *whole = torch.autograd.grad(plain, [feature, *inner])
    strength = 2 / (1 + math.exp(-10 * fraction)) - 1
    assert torch.allclose(reversed_, -strength * straight, atol=1e-8)
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(own, whole, strict=True))


def test_micro_batches_change_no_gradient():
    data = domains(tuple(t[:12] for t in images(24)), tuple(t[:12] for t in source()))
    whole, cut = (
        first_gradients(DANN(hidden=8), CNN(), None, data, micro_batch=size, batch_size=12) for size in (None, 4)
    )
    assert any("discriminator" in name for name in whole)
    assert_equal_gradients(whole, cut)


def test_arguments_that_make_no_sense_are_refused():
    for bad in ({"hidden": 0}, {"gamma": 0.0}):
        with pytest.raises(InputError, match="must be positive"):
            DANN(**bad)

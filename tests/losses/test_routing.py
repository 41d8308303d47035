"""Losses on a router's scores, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from transfuse.losses import balance_loss, router_z_loss


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_is_one_for_uniform_routing_however_many_experts_a_token_has(top_k):
    scores = torch.stack([torch.arange(6.0).roll(i) for i in range(6)])
    assert balance_loss(scores, top_k).item() == pytest.approx(1.0)


def test_balance_is_the_number_of_experts_where_one_gets_everything():
    scores = torch.zeros(5, 4)
    scores[:, 2] = 50.0
    assert balance_loss(scores, 1).item() == pytest.approx(4.0)


def test_balance_by_hand_and_its_gradient_flows_through_the_probabilities():
    scores = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, 1.0]], requires_grad=True)
    p = scores.softmax(-1).mean(0)
    shares = torch.tensor([2 / 4, 1 / 4, 1 / 4])
    expected = 3 * (shares * p).sum()
    assert torch.allclose(balance_loss(scores, 2), expected)
    found = torch.autograd.grad(balance_loss(scores, 2), scores)[0]
    assert torch.allclose(found, torch.autograd.grad(expected, scores)[0])


def test_z_loss_of_equal_scores_is_the_square_of_the_log_of_their_number():
    assert torch.allclose(router_z_loss(torch.zeros(2, 3, 8)), torch.full((2, 3), math.log(8) ** 2))
    assert router_z_loss(torch.tensor([[0.0, math.log(3)]])).item() == pytest.approx(math.log(4) ** 2)


def test_impossible_choices_are_refused():
    for scores, top_k in ((torch.zeros(3, 2), 3), (torch.zeros(3, 2), 0), (torch.zeros(0, 2), 1), (torch.zeros(2), 1)):
        with pytest.raises(ValueError, match="balance needs scores"):
            balance_loss(scores, top_k)

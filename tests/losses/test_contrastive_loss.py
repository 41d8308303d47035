from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from transfuse.losses import info_nce, nce


def rows(count: int = 5, width: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looped(
    queries: Tensor, keys: Tensor, i: int, temperature: float, among: list[int], weights: dict[int, float]
) -> float:
    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    scores = {j: math.exp(cosine(queries[i].tolist(), keys[j].tolist()) / temperature) for j in among}
    total = sum(weights.values())
    return -sum(w / total * math.log(scores[j] / sum(scores.values())) for j, w in weights.items())


# InfoNCE


def test_info_nce_equals_a_loop_written_from_the_formula():
    queries, keys = rows(), rows(seed=1)
    found = info_nce(queries, keys, temperature=0.3)
    for i, value in enumerate(found.tolist()):
        assert value == pytest.approx(looped(queries, keys, i, 0.3, list(range(5)), {i: 1.0}))


def test_info_nce_takes_several_weighted_positives_and_masks():
    queries, keys = rows(3), rows(5, seed=1)
    positives = torch.tensor([[1.0, 3.0, 0, 0, 0], [0, 0, 2.0, 0, 0], [0, 0, 0, 0, 0]])
    candidates = torch.tensor([[True, True, True, False, False], [True] * 5, [True] * 5])
    found = info_nce(queries, keys, temperature=0.3, positives=positives, candidates=candidates)
    assert found[0].item() == pytest.approx(looped(queries, keys, 0, 0.3, [0, 1, 2], {0: 1.0, 1: 3.0}))
    assert found[1].item() == pytest.approx(looped(queries, keys, 1, 0.3, list(range(5)), {2: 2.0}))
    assert found[2].item() == 0.0, "a query without a positive"


def test_info_nce_of_one_sample_is_zero():
    assert info_nce(rows(1), rows(1, seed=1)).tolist() == [0.0]


def test_info_nce_of_orthogonal_rows_tends_to_zero_with_the_temperature():
    eye = torch.eye(4)
    values = [info_nce(eye, eye, temperature=t).mean().item() for t in (1.0, 0.1, 0.01)]
    assert values[0] > values[1] > values[2]
    assert values[2] < 1e-6


def test_info_nce_both_ways_does_not_depend_on_which_side_comes_first():
    one, other = rows(), rows(seed=1)
    both = info_nce(one, other).mean() + info_nce(other, one).mean()
    assert torch.equal(both, info_nce(other, one).mean() + info_nce(one, other).mean())


def test_info_nce_without_normalising_takes_plain_products():
    queries, keys = rows(), rows(seed=1)
    expected = torch.nn.functional.cross_entropy(queries @ keys.T, torch.arange(5), reduction="none")
    assert torch.allclose(info_nce(queries, keys, temperature=1.0, normalise=False), expected)


def test_info_nce_has_a_finite_gradient_with_masked_candidates():
    queries = rows().requires_grad_()
    info_nce(queries, rows(seed=1), candidates=torch.eye(5, dtype=torch.bool)).sum().backward()
    assert queries.grad.isfinite().all()


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        (rows(5, 3), {}, r"equal width, found \(5, 4\) and \(5, 3\)"),
        (rows(6), {}, "5 queries and 6 keys: say with positives"),
        (rows(), {"positives": torch.ones(5, 4)}, r"positives must be \(5, 5\)"),
        (rows(), {"candidates": torch.ones(1, 5)}, r"candidates must be \(5, 5\)"),
        (rows(), {"temperature": 0.0}, "temperature must be positive, found 0.0"),
    ],
)
def test_info_nce_says_what_does_not_fit(keys, options, message):
    with pytest.raises(ValueError, match=message):
        info_nce(rows(), keys, **options)


# NCE


def test_nce_equals_a_loop_written_from_the_formula():
    positive, negatives = rows(3, 1)[:, 0], rows(3, 7, seed=1)

    def q(f: float) -> float:
        return math.exp(f) / (math.exp(f) + 7 / 50)

    for value, f, others in zip(nce(positive, negatives, population=50), positive, negatives, strict=True):
        expected = -math.log(q(f.item())) - sum(math.log(1 - q(g)) for g in others.tolist())
        assert value.item() == pytest.approx(expected)


def test_nce_of_a_critic_that_knows_nothing_has_its_closed_form():
    value = nce(torch.zeros(1), torch.zeros(1, 1), population=2)
    assert value.item() == pytest.approx(-math.log(2 / 3) - math.log(1 / 3))


def test_nce_does_not_overflow():
    positive = torch.tensor([-500.0], requires_grad=True)
    value = nce(positive, torch.full((1, 3), 500.0), population=10)
    value.sum().backward()
    assert value.isfinite().all() and positive.grad.isfinite().all()


def test_nce_is_least_where_q_is_the_chance_that_a_pair_is_a_true_one():
    """A pair that comes twice as a true one and once as a drawn one: q = exp(f) / (exp(f) + 1) = 2 / 3."""
    score = torch.zeros(2, requires_grad=True)  # of a pair that belongs together, and of one that does not
    optimiser = torch.optim.Adam([score], lr=0.05)
    for _ in range(800):
        optimiser.zero_grad()
        loss = nce(score[:1], score[:1, None], population=1) + nce(score[:1], score[1:, None], population=1)
        loss.sum().backward()
        optimiser.step()
    assert score[0].item() == pytest.approx(math.log(2), abs=0.02)


def test_nce_refuses_scores_that_do_not_belong_together():
    with pytest.raises(ValueError, match=r"found \(3,\) and \(4, 2\)"):
        nce(torch.zeros(3), torch.zeros(4, 2), population=5)

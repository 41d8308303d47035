"""The mixture of pools, and the sampler that slides it."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from helpers import CNN, language_model, trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from transfuse.core.batch import Batch, align_tokens, joined
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.mixture import Mixture, interpolated
from transfuse.core.outputs import Outputs
from transfuse.core.run import Run
from transfuse.core.streams import Draw, as_data
from transfuse.core.training import Training
from transfuse.cotrain import DynamicSampler, StaticMixture, extend_vocabulary
from transfuse.cotrain.dynamic_sampler import GROWTH

DRAW = Draw(8, None, True, seed=3)


def pools(sizes: tuple[int, ...] = (10, 7, 5)) -> dict[str, TensorDataset]:
    """Pools whose samples say where they are from: pool * 100 + number."""
    return {
        name: TensorDataset((100 * k + torch.arange(size, dtype=torch.float))[:, None], torch.arange(size) % 3)
        for k, (name, size) in enumerate(zip("abc", sizes, strict=False))
    }


def data(sizes: tuple[int, ...] = (10, 7, 5)) -> dict:
    return {name: as_data(pool) for name, pool in pools(sizes).items()}


def fixed(*shares: float) -> Mixture:
    row = torch.tensor(shares, dtype=torch.float64)
    return Mixture(data(), lambda at: row.expand(len(at), -1))


def run_for(steps: int = 100, batch_size: int = 8) -> Run:
    return Run({"target": CNN()}, data(), training=Training(steps=steps, batch_size=batch_size))


def stream(mixture: Mixture, updates: int, start: int = 0, draw: Draw = DRAW) -> Tensor:
    return torch.cat([m.inputs[:, 0] for micro in islice(mixture.epoch(draw, start), updates) for m in micro])


# The mixture


def test_a_stream_entered_in_the_middle_is_the_rest_of_the_whole():
    shares = interpolated([torch.tensor([1.0, 0, 0]), torch.tensor([0, 0.5, 0.5])], lambda u: u, 160)
    mixture = Mixture(data(), shares)
    whole = stream(mixture, 20)
    for start in (1, 7, 19):
        assert torch.equal(stream(mixture, 20 - start, start), whole[8 * start :])


def test_every_sample_of_a_pool_is_seen_once_before_any_is_seen_again():
    seen = stream(fixed(0.5, 0.3, 0.2), 40)
    for k, size in enumerate((10, 7, 5)):
        mine = (seen[seen // 100 == k] % 100).long()
        for turn in mine.split(size):
            assert len(turn.unique()) == len(turn)


def test_the_order_of_a_pool_changes_from_pass_to_pass():
    seen = stream(fixed(1, 0, 0), 10)
    assert not torch.equal(seen[:10], seen[10:20])
    assert set(seen[:10].tolist()) == set(seen[10:20].tolist())


def test_counts_are_what_was_drawn():
    mixture = fixed(0.5, 0.3, 0.2)
    drawn = torch.bincount((stream(mixture, 25) // 100).long(), minlength=3)
    assert torch.equal(mixture.counts(DRAW, 25), drawn)


def test_two_processes_see_the_stream_of_one():
    mixture = fixed(0.5, 0.3, 0.2)
    draws = [Draw(8, None, True, 3, rank, 2) for rank in (0, 1)]
    halves = [[batch for micro in islice(mixture.epoch(draw, 0), 5) for batch in micro] for draw in draws]
    both = torch.cat([torch.cat([a.inputs, b.inputs])[:, 0] for a, b in zip(*halves, strict=True)])
    assert torch.equal(both, stream(mixture, 5))


def test_samples_know_their_pool_and_their_label_stays_with_them():
    for micro in islice(fixed(0.4, 0.3, 0.3).epoch(DRAW, 0), 5):
        for batch in micro:
            assert torch.equal(batch.domain, (batch.inputs[:, 0] // 100).long())
            assert torch.equal(batch.labels, (batch.inputs[:, 0] % 100).long() % 3)


def test_the_pool_is_drawn_for_every_sample_and_not_for_every_batch():
    updates = islice(fixed(0.5, 0.5, 0).epoch(DRAW, 0), 20)
    assert sum(len(batch.domain.unique()) > 1 for micro in updates for batch in micro) > 15


def test_pools_of_different_length_are_padded_and_masked():
    def text(tokens: int) -> Batch:
        ids = torch.ones(2, tokens, dtype=torch.long)
        return Batch(inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels=ids)

    short, long = text(3), text(5)
    both = joined([short, long])
    assert both.inputs["attention_mask"].sum(1).tolist() == [3, 3, 5, 5]
    assert both.labels[0].tolist() == [1, 1, 1, -100, -100]


def test_lengths_without_a_mask_are_refused():
    with pytest.raises(InputError, match="attention_mask"):
        joined([Batch(inputs={"input_ids": torch.ones(2, n, dtype=torch.long)}) for n in (3, 5)])
    with pytest.raises(InputError, match="differ in shape"):
        joined([Batch(inputs=torch.ones(2, n)) for n in (3, 5)])


def test_a_pool_that_cannot_be_read_by_number_is_refused():
    with pytest.raises(InputError, match="pool 'b'"):
        Mixture({"a": as_data(torch.ones(3, 1)), "b": as_data(lambda: iter([torch.ones(3, 1)]))}, lambda at: at)


# Shares over time


@pytest.mark.parametrize("growth", GROWTH)
def test_shares_go_from_start_to_end_and_always_add_up_to_one(growth):
    method = DynamicSampler({"a": 0.9, "b": 0.1}, {"b": 0.3, "c": 0.7}, grow=0.5, growth=growth)
    shares = method.shares(run_for())(torch.arange(1000))
    assert torch.allclose(shares.sum(1), torch.ones(1000, dtype=torch.float64))
    assert shares[0].tolist() == pytest.approx([0.9, 0.1, 0.0], abs=1e-12)
    for t in (400, 401, 999):  # T_grow is half of 100 steps of 8 samples
        assert shares[t].tolist() == pytest.approx([0.0, 0.3, 0.7], abs=1e-12)
    assert bool((shares[1:, 2] >= shares[:-1, 2] - 1e-12).all())


def test_growth_has_its_closed_forms():
    u = torch.tensor([0.0, 0.25, 1.0])
    assert GROWTH["linear"](u, 0.2).tolist() == pytest.approx([0.2, 0.4, 1.0])
    assert GROWTH["root"](u, 0.2).tolist() == pytest.approx([0.2, math.sqrt(0.25 * 0.96 + 0.04), 1.0])
    assert GROWTH["cosine"](u, 0.0).tolist() == pytest.approx([0.0, (1 - math.cos(math.pi / 4)) / 2, 1.0])


def test_nothing_to_grow_is_the_end_at_once():
    shares = DynamicSampler({"a": 1.0}, {"c": 1.0}, grow=0).shares(run_for())(torch.arange(3))
    assert shares.tolist() == [[0, 0, 1]] * 3


def test_a_middle_is_reached_half_way():
    shares = DynamicSampler({"a": 1.0}, {"c": 1.0}, middle={"b": 1.0}).shares(run_for())(
        torch.tensor([0, 200, 400, 800])
    )
    assert shares.tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]]


def test_counts_follow_the_integral_of_the_shares():
    method, steps = DynamicSampler({"a": 0.8, "b": 0.2}, {"a": 0.1, "c": 0.9}), 1000
    mixture = Mixture(data(), method.shares(run_for(steps)))
    total = 8 * steps
    expected = total * torch.tensor([0.45, 0.1, 0.45])
    spread = (expected * (1 - expected / total)).sqrt()
    assert bool(((mixture.counts(DRAW, steps) - expected).abs() < 3 * spread).all())


def test_static_is_dynamic_with_the_same_shares_at_both_ends():
    mix = {"a": 0.5, "b": 0.3, "c": 0.2}
    static, dynamic = (m.mixture(run_for()) for m in (StaticMixture(mix), DynamicSampler(mix, mix)))
    assert torch.equal(stream(static, 20), stream(dynamic, 20))


@pytest.mark.parametrize(
    ("mix", "says"),
    [
        ({"a": 0.5, "b": 0.2}, "add up to 1"),
        ({"a": 1.5, "b": -0.5}, "not be negative"),
        ({"a": 0.5, "d": 0.5}, "names 'd', the pools are a, b, c"),
    ],
)
def test_shares_that_are_none_are_refused_before_training(mix, says):
    for method in (StaticMixture(mix), DynamicSampler(mix, {"a": 1.0})):
        with pytest.raises(InputError, match=says):
            trainer(method, nn.Linear(1, 3), None, data(), steps=2, batch_size=4).fit()


def test_an_empty_pool_is_refused():
    with pytest.raises(InputError, match="empty"):
        as_data(TensorDataset(torch.ones(0, 1)))


def test_epochs_are_refused_with_the_reason():
    with pytest.raises(InputError, match=r"say steps="):
        trainer(DynamicSampler({"a": 1.0}, {"b": 1.0}), nn.Linear(1, 3), None, data(), epochs=1, batch_size=4).fit()


def test_a_single_pool_is_no_mixture():
    with pytest.raises(InputError, match="several pools"):
        trainer(StaticMixture({"data": 1.0}), nn.Linear(1, 3), None, pools()["a"], steps=2, batch_size=4).fit()


@pytest.mark.parametrize("wrong", [{"growth": "lineer"}, {"grow": 2.0}, {"initial": 1.0}, {"prompt": "none"}])
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match="DynamicSampler"):
        DynamicSampler({"a": 1.0}, {"b": 1.0}, **wrong)


# Prompts


def prompted() -> Batch:
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, :3] = -100
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[0, 5:] = 0
    return align_tokens(Batch(inputs={"input_ids": tokens, "attention_mask": mask}, labels=labels))


def test_by_default_a_prompt_teaches_nothing():
    batch, model = prompted(), language_model()
    outputs = Outputs(model(**batch.inputs))
    assert list(DynamicSampler({}, {}).loss(outputs, batch, run_for())) == ["labels"]


def test_a_fading_prompt_weighs_what_is_left_of_the_way():
    batch, model, run = prompted(), language_model(), run_for()
    method = DynamicSampler({}, {}, prompt="fading", grow=0.5)
    for step, weight in ((0, 1.0), (25, 0.5), (50, 0.0), (99, 0.0)):
        run.clock = Clock(step=step, steps=100)
        terms = method.loss(Outputs(model(**batch.inputs)), batch, run)
        assert terms["prompt"].weight == pytest.approx(weight)
        # Tokens 1 and 2 are predicted from inside the prompt; token 3, the first of the answer, has a label.
        assert int(terms["prompt"].count) == 4 * 2 == int(method.units["prompt"](batch))
        assert int(terms["labels"].count) == 3 * 3 + 2


# Vocabulary


@pytest.mark.parametrize("tie", [True, False])
def test_a_new_token_begins_as_the_mean_of_its_pieces(tie):
    from transfuse.models.lm import DecoderLM

    model = DecoderLM(11, dim=8, depth=1, heads=2, context=8, tie=tie)
    old = (model.embed_tokens.weight.clone(), model.head.weight.clone())
    extend_vocabulary(model, [[1, 2], [3]])
    for layer, before in zip((model.embed_tokens, model.head), old, strict=True):
        assert torch.equal(layer.weight[:11], before)
        assert torch.allclose(layer.weight[11], (before[1] + before[2]) / 2)
        assert torch.equal(layer.weight[12], before[3])
    assert (model.head.weight is model.embed_tokens.weight) == tie
    assert model(torch.tensor([[12, 11, 0]])).shape == (1, 3, 13)


def test_pieces_that_are_no_old_tokens_are_refused():
    for pieces in ([[11]], [[]]):
        with pytest.raises(InputError, match="new token 0"):
            extend_vocabulary(language_model(), pieces)
    with pytest.raises(InputError, match="no language model"):
        extend_vocabulary(CNN(), [[0]])

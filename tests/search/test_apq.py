"""APQ: codes, costs, evolution, fake quantisation, the supernet, and the predictor that is transferred."""

from __future__ import annotations

import pytest
import torch
from helpers import CNN, digest, trainer
from search.examples_search import EXAMPLES, shapes, small_net
from torch import nn
from torch.nn import functional as F

from transfuse import transfer
from transfuse.core.errors import InputError
from transfuse.core.quantization import Clip, fake_quantise, quantised_weight
from transfuse.core.streams import as_data
from transfuse.search import APQ, ElasticNet, Predictor, Space, Spec, evolve
from transfuse.search.elastic import recalibrate

SPACE = Space(4, (3, 5, 7), (8, 16, 24), (2, 3, 4), (4, 6, 8))


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=draw(seed))


def data() -> dict:
    return {"train": as_data(shapes()), "probe": as_data(shapes(12, seed=1))}


# Codes


def test_a_code_comes_back_as_the_network_it_was_made_of():
    generator = draw()
    for _ in range(1000):
        spec = SPACE.draw(generator, quantised=True)
        assert SPACE.valid(spec)
        assert SPACE.decode(SPACE.encode(spec)).used() == spec.used()


def test_skipped_blocks_are_zeros_and_full_precision_has_the_code_of_the_most_bits():
    spec = Spec(2, (3, 5, 7, 7), (8, 16, 24, 24))
    code = SPACE.encode(spec)
    architecture, bits = code[: SPACE.half].view(4, -1), code[SPACE.half :].view(4, 4, 3)
    assert architecture[2:].sum() == bits[2:].sum() == 0
    assert architecture[:2].sum() == 4
    assert torch.equal(bits[:2], F.one_hot(torch.full((2, 4), 2), 3).float())
    eight = Spec(2, spec.kernels, spec.widths, ((8,) * 4,) * 4)
    assert torch.equal(code, SPACE.encode(eight))


def test_bits_change_the_code():
    spec = SPACE.draw(draw(), quantised=True)
    flipped = tuple(tuple(6 if b != 6 else 8 for b in block) for block in spec.bits)
    assert not torch.equal(SPACE.encode(spec), SPACE.encode(Spec(spec.depth, spec.kernels, spec.widths, flipped)))


def test_networks_that_must_not_be_are_refused():
    seven = Spec(2, (7, 3, 3, 3), (8,) * 4, ((8, 8, 8, 4),) + ((8,) * 4,) * 3)
    for spec in (seven, Spec(5, (3,) * 4, (8,) * 4)):
        with pytest.raises(InputError, match="no valid network"):
            SPACE.encode(spec)
    with pytest.raises(InputError, match="9 is no width"):
        SPACE.encode(Spec(2, (3,) * 4, (9,) * 4))
    # What a skipped block says does not matter.
    assert SPACE.valid(Spec(2, (3, 3, 7, 7), (8,) * 4, ((8, 8, 8, 4),) * 4))


@pytest.mark.parametrize("wrong", [{"kernels": ()}, {"widths": (16, 8)}, {"depths": (2, 5)}])
def test_a_space_without_a_choice_is_refused(wrong):
    with pytest.raises(InputError):
        Space(**({"blocks": 4, "kernels": (3,), "widths": (8,), "depths": (2,), "bits": (8,)} | wrong))


# Fake quantisation


def test_eight_bits_are_within_half_a_step_and_rounding_twice_is_rounding_once():
    values, bound = torch.linspace(0, 6, 997), torch.tensor(6.0)
    rounded = fake_quantise(values, 8, bound, signed=False)
    assert (rounded - values).abs().max() <= 6 / 255 / 2 + 1e-6
    assert torch.allclose(fake_quantise(rounded, 8, bound, signed=False), rounded, atol=1e-6)
    weights = torch.randn(50, generator=draw())
    assert torch.allclose(quantised_weight(quantised_weight(weights, 4), 4), quantised_weight(weights, 4), atol=1e-6)
    assert len(quantised_weight(weights, 2).unique()) <= 3


def test_the_gradient_is_one_inside_zero_outside_and_the_bound_gets_what_is_clipped():
    values = torch.tensor([-1.0, 0.5, 5.0, 7.0, 9.0], requires_grad=True)
    clip = Clip(6.0)
    clip(values, 4).sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 0, 0]
    assert clip.bound.grad.item() == 2


def test_one_bit_is_refused():
    with pytest.raises(ValueError, match="2 or more"):
        fake_quantise(torch.ones(2), 1, torch.tensor(1.0), signed=True)


# The supernet


@pytest.mark.parametrize("quantised", [False, True])
def test_a_sub_network_is_the_independent_small_one_with_its_weights(quantised):
    net, generator = small_net().eval(), draw(1)
    for _ in range(8):
        spec = net.space.draw(generator, quantised)
        small = net.extract(spec).eval()
        with net.using(spec), torch.no_grad():
            assert torch.allclose(net(images()), small(images()), atol=1e-6)
        assert sum(p.numel() for p in small.parameters()) <= sum(p.numel() for p in net.parameters())
    assert net.spec == net.space.largest()


def test_recalibrated_statistics_are_those_of_the_network_in_use():
    net, spec = small_net(), small_net().space.smallest()
    batches = [images(30, seed) for seed in range(3)]
    small = net.extract(spec)
    with net.using(spec):
        recalibrate(net, batches)
    recalibrate(small, batches)
    mine, theirs = net.blocks[0].norm1, small.blocks[0].norm1
    assert torch.allclose(mine.running_mean[: spec.widths[0]], theirs.running_mean, atol=1e-6)
    assert mine.momentum == 0.1
    first = net.stem[0](torch.cat(batches))
    assert torch.allclose(net.stem[1].running_mean, first.mean((0, 2, 3)), atol=1e-5)


def test_cost_adds_up_and_grows_with_every_choice():
    net = small_net()
    assert net.cost(Spec(1, (3, 5), (4, 8))) == 64 * (2 * 4 * 4 + 9 * 4)
    assert net.cost(Spec(1, (3, 5), (4, 8), ((2, 8, 8, 2), (8,) * 4))) == 16 * (2 * 4 * 4) + 16 * 9 * 4
    assert max(map(net.cost, net.space.specs(quantised=False))) == net.cost(net.space.largest())


# The predictor


def test_without_weights_for_bits_it_is_the_predictor_of_full_precision():
    predictor, codes = Predictor(SPACE, 16), torch.stack([SPACE.encode(SPACE.draw(draw(s), True)) for s in range(9)])
    nn.init.zeros_(predictor.bits.weight)
    nn.init.zeros_(predictor.bits.bias)
    assert torch.equal(predictor(codes), predictor(codes, quantised=False))


def test_bits_enter_after_the_first_rectifier():
    predictor, code = Predictor(SPACE, 16), SPACE.encode(SPACE.draw(draw(), True))[None]
    h = predictor.architecture(code[:, : SPACE.half]).relu() + predictor.bits(code[:, SPACE.half :])
    assert torch.equal(predictor(code), predictor.rest(h)[:, 0])


def test_what_is_transferred_is_everything_but_the_bits():
    predictor = Predictor(SPACE, 16)
    before = {name: p.detach().clone() for name, p in predictor.named_parameters()}
    predictor.forget(everything=False)
    changed = {name for name, p in predictor.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"bits.weight", "bits.bias"}
    predictor.forget(everything=True)
    assert not any(torch.equal(p, before[name]) for name, p in predictor.named_parameters())


# Evolution


def test_evolution_finds_the_best_of_a_tiny_space_within_the_budget():
    space = Space(2, (3,), (4, 8), (1, 2), (2, 8))
    everything = space.specs(quantised=True)
    weights = torch.rand(space.length, generator=draw(5))
    worth = {spec.used(): float(space.encode(spec) @ weights) for spec in everything}

    def cost(spec: Spec) -> float:
        return float(sum(sum(spec.bits[i]) * spec.widths[i] for i in range(spec.depth)))

    def fitness(specs) -> torch.Tensor:
        return torch.tensor([worth[s.used()] for s in specs])

    budget = 0.5 * max(map(cost, everything))
    best = max(worth[s.used()] for s in everything if cost(s) <= budget)
    found = [evolve(space, fitness, cost, budget, draw(seed), population=40, iterations=40) for seed in range(20)]
    assert all(cost(spec) <= budget for spec in found)
    assert sum(worth[spec.used()] == best for spec in found) >= 19


def test_all_children_enter_the_population():
    space, seen = Space(2, (3, 5), (4, 8), (1, 2), (2, 8)), []

    def fitness(specs) -> torch.Tensor:
        seen.append(len(specs))
        return torch.zeros(len(specs))

    evolve(space, fitness, lambda _: 0.0, 1.0, draw(), population=20, iterations=3)
    assert seen == [20, 20, 20, 20]


def test_an_impossible_budget_is_answered_with_the_least_cost():
    with pytest.raises(InputError, match=r"the cheapest of them costs 3"):
        evolve(SPACE, lambda s: torch.zeros(len(s)), lambda _: 3.0, 2.0, draw())


# The method


def test_the_deployed_network_is_within_the_budget_and_of_its_own_size():
    example = EXAMPLES["APQ"]()
    result = transfer(example.method, target=example.target, data=example.data, test=example.test, **example.options)
    net = result.model
    assert isinstance(net, ElasticNet)
    assert net.cost(net.spec) <= 0.8 * small_net().cost(small_net().space.largest())
    assert net.spec.bits is not None
    assert len(net.blocks) == net.spec.depth


def test_scoring_leaves_the_supernet_as_it_was():
    seen = []

    class Watched(APQ):
        def begin_stage(self, i, run):
            before = digest(run["target"])
            begun = super().begin_stage(i, run)
            seen.append(digest(run["target"]) == before)
            return begun

    method = Watched(full=3, quantised=2, qat_steps=1, hidden=8, population=4, iterations=1, calibration=1, budget=1)
    trainer(method, small_net(), None, data(), steps=10, batch_size=10, lr=0.01).fit()
    assert seen == [True] * 5


def test_every_scored_network_is_another_one_and_scores_are_accuracies():
    method = EXAMPLES["APQ"]().method
    trainer(method, small_net(), None, data(), steps=10, batch_size=10, lr=0.01).fit()
    for name, count in (("full", 4), ("quantised", 3)):
        assert len(method.scored[name].unique(dim=0)) == count
        assert bool(((method.scored[f"{name}/accuracy"] * 12).frac().abs() < 1e-4).all())


def test_bits_learn_only_when_networks_are_quantised():
    moved = {}

    class Watched(APQ):
        def end_stage(self, i, run):
            super().end_stage(i, run)
            moved[i] = {n: p.detach().clone() for n, p in self.predictor.named_parameters()}

    method = Watched(full=3, quantised=2, qat_steps=0, hidden=8, population=4, iterations=1, calibration=1, budget=1)
    trainer(method, small_net(), None, data(), steps=40, batch_size=10, lr=0.01).fit()
    assert torch.equal(moved[1]["bits.weight"], moved[0]["bits.weight"])
    assert not torch.equal(moved[1]["architecture.weight"], moved[0]["architecture.weight"])
    assert not torch.equal(moved[2]["bits.weight"], moved[1]["bits.weight"])


@pytest.mark.parametrize(
    "wrong", ["budget: 0", "full: 1", "quantised: 1", "qat_steps: -1", "population: 3", "calibration: 0"]
)
def test_arguments_out_of_range_are_refused(wrong):
    name, value = wrong.split(": ")
    with pytest.raises(InputError, match="APQ"):
        APQ(**{name: int(value)})


def test_other_targets_and_data_are_refused_before_training():
    with pytest.raises(InputError, match="expected a network that holds others"):
        trainer(
            APQ(),
            CNN(),
            None,
            {n: as_data((torch.randn(8, 1, 4, 4), torch.arange(8) % 3)) for n in ("train", "probe")},
            batch_size=4,
        ).fit()
    with pytest.raises(InputError, match='"probe"'):
        trainer(APQ(), small_net(), None, shapes(), batch_size=4).fit()

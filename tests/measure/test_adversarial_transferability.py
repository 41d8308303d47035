from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers import digest
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from transfuse.core.errors import InputError, ShapeError
from transfuse.measure import (
    AdversarialTransferability,
    Measurement,
    Table,
    agreement_with_results,
    linear_transfer,
    pearson,
    spearman,
)
from transfuse.measure.adversarial import _aligned, attack, jacobian, matching_distance

DRAW = torch.Generator().manual_seed(0)
INPUTS = torch.rand(40, 1, 4, 4, generator=DRAW)


def net(classes: int = 3, seed: int = 0, norm: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12) if norm else nn.Identity(), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(12, classes))


class Times(nn.Module):
    """A model whose logits go through a fixed matrix."""

    def __init__(self, model: nn.Module, matrix: Tensor):
        super().__init__()
        self.model, self.matrix = model, matrix

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs) @ self.matrix


def measured(source: Any, target: nn.Module, data: Any = INPUTS, **arguments: Any) -> Measurement:
    return AdversarialTransferability(**({"steps": 5, "epsilon": 0.1} | arguments)).measure(
        source=source, target=target, data=data
    )


def test_a_model_fools_itself_exactly_as_much_as_itself() -> None:
    found = measured(net(), net())
    assert found["alpha"] == pytest.approx(1, abs=1e-6)
    own = found.tables["sources"].values[0]
    assert own[1] == pytest.approx(own[2].item(), abs=1e-6), "combined is gamma where alpha is 1"


def test_directions_swap_attacker_and_victim() -> None:
    there = measured(net(seed=1), net(seed=2), direction="source_to_target")
    back = measured(net(seed=2), net(seed=1), direction="target_to_source")
    assert {k: there[k] for k in ("alpha", "gamma")} == {k: back[k] for k in ("alpha", "gamma")}
    assert there["alpha"] != measured(net(seed=1), net(seed=2), direction="target_to_source")["alpha"]


def test_alignment_is_one_for_a_constant_direction_and_about_one_over_n_for_random_ones() -> None:
    u, v = torch.tensor([[0.6, 0.8]]), torch.tensor([[0.0, 1.0, 0.0]])
    assert _aligned(u.expand(50, 2), v.expand(50, 3)).item() == pytest.approx(1)
    found = []
    for _ in range(200):
        sign = torch.randint(2, (50, 1), generator=DRAW) * 2.0 - 1
        found.append(_aligned(u.expand(50, 2) * sign, v.expand(50, 3)))
        assert 0 <= found[-1] <= 1
    assert torch.stack(found).mean().item() == pytest.approx(1 / 50, rel=0.3)


def test_scaling_the_victim_changes_nothing_and_turning_outputs_not_the_direction() -> None:
    turn = torch.linalg.qr(torch.randn(3, 3, generator=DRAW))[0]
    # With two classes an attack on scaled logits goes the same way, so only the scale is left to differ.
    plain = measured(net(seed=1), net(2, seed=2))
    scaled = measured(net(seed=1), Times(net(2, seed=2), 7 * torch.eye(2)))
    assert [scaled[k] for k in ("alpha", "gamma")] == pytest.approx([plain[k] for k in ("alpha", "gamma")], rel=1e-3)
    u, v, alpha = torch.randn(30, 4, generator=DRAW), torch.randn(30, 3, generator=DRAW), torch.rand(30, generator=DRAW)
    assert _aligned(u, v @ turn, alpha).item() == pytest.approx(_aligned(u, v, alpha).item(), rel=1e-4)


def test_alpha_is_a_mean_of_ratios() -> None:
    source, target = net(seed=1), net(seed=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = torch.rand(INPUTS.shape) * 2 - 1
    hit, own = (attack(m, INPUTS, start, 0.1, 5) for m in (source, target))
    with torch.no_grad():
        av, vv = ((target(INPUTS) - target(x)).norm(dim=1) for x in (hit, own))
    assert measured(source, target)["alpha"] == pytest.approx((av / vv).mean().item(), rel=1e-5)


def test_nothing_moves_without_an_attack_and_is_counted() -> None:
    found = measured(net(seed=1), net(seed=2), epsilon=0.0)
    assert "source: 40 inputs do not move" in found.notes
    assert found["success"] != found["success"] and json.loads(json.dumps(found.as_dict()))["numbers"]["alpha"] is None


class TestAttack:
    @pytest.mark.parametrize("steps", [1, 7])
    def test_stays_in_the_ball_and_in_the_range(self, steps: int) -> None:
        start = torch.rand(INPUTS.shape, generator=DRAW) * 2 - 1
        moved = attack(net(), INPUTS, start, 0.2, steps)
        assert (moved - INPUTS).abs().max() <= 0.2 + 1e-6
        assert moved.min() >= 0 and moved.max() <= 1

    def test_lowers_the_models_trust_in_its_own_answer_without_labels(self) -> None:
        model, start = net(), torch.zeros_like(INPUTS)
        said = model(INPUTS).argmax(1)
        moved = attack(model, INPUTS, start, 0.1, 10)
        before, after = (nn.functional.cross_entropy(model(x), said, reduction="none") for x in (INPUTS, moved))
        assert (after > before).float().mean() > 0.95

    def test_one_step_is_as_long_as_the_radius_and_begins_at_random(self) -> None:
        middle = torch.full_like(INPUTS, 0.5)
        start = torch.rand(INPUTS.shape, generator=DRAW) * 2 - 1
        moved = attack(net(), middle, start, 0.1, 1)
        from_random = (middle + 0.1 * start).requires_grad_()
        model = net()
        nn.functional.cross_entropy(model(from_random), model(middle).argmax(1), reduction="sum").backward()
        expected = (from_random + 0.1 * from_random.grad.sign()).clamp(0.4, 0.6)
        assert torch.allclose(moved, expected, atol=1e-6)
        assert not torch.allclose(moved, attack(net(), middle, torch.zeros_like(middle), 0.1, 1))

    def test_doubling_the_range_doubles_the_radius(self) -> None:
        wide = measured(
            nn.Sequential(_Rescale(), net(seed=1)), nn.Sequential(_Rescale(), net(seed=2)), 2 * INPUTS - 1, low=-1.0
        )
        assert wide["alpha"] == pytest.approx(measured(net(seed=1), net(seed=2))["alpha"], rel=1e-3)


class _Rescale(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs + 1) / 2


class TestData:
    def test_what_the_target_answers_wrongly_is_left_out(self) -> None:
        target = net(seed=2)
        labels = target(INPUTS).argmax(1)
        labels[:10] = (labels[:10] + 1) % 3
        found = measured(net(seed=1), target, TensorDataset(INPUTS, labels))
        assert "10 inputs that the target answers wrongly were left out; 30 are looked at" in found.notes
        with pytest.raises(InputError, match="0 inputs are left"):
            measured(net(seed=1), target, TensorDataset(INPUTS, (target(INPUTS).argmax(1) + 1) % 3))

    def test_a_pool_of_sources_gives_a_row_each_with_classes_of_its_own(self) -> None:
        found = measured({"two": net(2, 1), "five": net(5, 2)}, net(3))
        assert found.tables["sources"].rows == ("two", "five") and not found.numbers
        assert set(found.intervals) == {"two alpha", "five alpha"}
        assert (found.tables["null"].values < found.tables["sources"].values[:, 1:3]).all()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"source": TensorDataset(INPUTS)},
                "source is a model, or a list or dict of models, found a TensorDataset",
            ),
            ({"target": {"a": net()}}, "target is one model, found a dict"),
            ({"target": None}, "target is one model, found nothing"),
            ({"data": None}, "pass data="),
            ({"data": 3 * INPUTS}, "not in \\[0, 1\\]: give the range"),
            ({"data": torch.randint(5, (8, 4))}, "inputs must be one tensor of real numbers"),
            ({"data": TensorDataset(INPUTS, torch.full((40,), 3))}, "3 classes apart, and the data has the label 3"),
        ],
    )
    def test_wrong_roles_are_refused(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            AdversarialTransferability().measure(**({"source": net(), "target": net(), "data": INPUTS} | arguments))

    @pytest.mark.parametrize(
        "arguments", [{"epsilon": -1}, {"steps": 0}, {"low": 1.0}, {"ridge": -1.0}, {"direction": "x"}]
    )
    def test_wrong_arguments_are_refused(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="found|unknown direction"):
            AdversarialTransferability(**arguments)


class TestGradients:
    def test_a_linear_image_of_the_source_is_matched_exactly(self) -> None:
        source = net(4, 1)
        target = Times(source, torch.randn(4, 3, generator=DRAW))
        assert measured(source, target, ridge=0.0).tables["matching"]["source", "distance"] < 1e-8
        assert measured(net(4, 5), target, ridge=0.0).tables["matching"]["source", "distance"] > 0.1

    def test_the_closed_form_is_the_least_squares_solution(self) -> None:
        source, target = torch.randn(20, 4, 6, generator=DRAW), torch.randn(20, 3, 6, generator=DRAW)
        rows = source.transpose(1, 2).reshape(-1, 4), target.transpose(1, 2).reshape(-1, 3)
        solution = torch.linalg.lstsq(*(r.double() for r in rows)).solution
        rest = (rows[1] - rows[0].double() @ solution).square().sum() / rows[1].square().sum()
        assert matching_distance(source, target, 0.0) == pytest.approx(rest.item(), rel=1e-6)
        with pytest.raises(ShapeError, match="of the same inputs"):
            matching_distance(source, target[:3])

    def test_jacobians_agree_with_torch(self) -> None:
        found = jacobian(net(), INPUTS[:3])
        for i in range(3):
            expected = torch.autograd.functional.jacobian(lambda x: net()(x[None])[0], INPUTS[i])
            assert torch.allclose(found[i], expected.flatten(1), atol=1e-6)


@pytest.mark.parametrize("direction", ["source_to_target", "target_to_source"])
def test_models_and_random_numbers_are_left_alone(direction: str) -> None:
    models = [net(seed=1, norm=True).train(), net(seed=2, norm=True)]
    models[0][1].weight.grad = torch.ones(12, 16)
    models[1][1].weight.requires_grad_(False)
    before, state = [digest(m) for m in models], torch.get_rng_state()
    AdversarialTransferability(direction, steps=3, ridge=1e-3).measure(source=models[0], target=models[1], data=INPUTS)
    assert [digest(m) for m in models] == before and torch.get_rng_state().equal(state)
    assert models[0].training and models[0][1].weight.grad.equal(torch.ones(12, 16))
    assert models[0][4].weight.grad is None and not models[1][1].weight.requires_grad


class TestTransfer:
    def test_features_that_know_the_answer_transfer_and_shuffled_labels_do_not(self) -> None:
        inputs = torch.rand(400, 1, 4, 4, generator=DRAW)
        with torch.no_grad():
            scores = net()[:4](inputs) @ torch.randn(12, generator=DRAW)
        labels = (scores > scores.median()).long()
        train, test = TensorDataset(inputs[:300], labels[:300]), TensorDataset(inputs[300:], labels[300:])
        good = linear_transfer(net(), train, test, epochs=100)
        shuffled = TensorDataset(inputs[:300], labels[:300][torch.randperm(300, generator=DRAW)])
        assert good.accuracy > 0.85 and good.loss < 0.4
        assert linear_transfer(net(), shuffled, test, epochs=100).accuracy < 0.7
        assert linear_transfer(net(), train, test, seed=1) == linear_transfer(net(), train, test, seed=1)

    def test_leaves_the_source_alone_and_needs_labels(self) -> None:
        model = net(norm=True).train()
        before, state = digest(model), torch.get_rng_state()
        data = TensorDataset(INPUTS, torch.arange(40) % 3)
        linear_transfer(model, data, data, epochs=1)
        assert digest(model) == before and model.training and torch.get_rng_state().equal(state)
        assert not any(m._forward_pre_hooks for m in model.modules())
        with pytest.raises(InputError, match="has none"):
            linear_transfer(model, INPUTS, data)


class TestAgreement:
    def test_coefficients_agree_with_scipy(self) -> None:
        stats = pytest.importorskip("scipy.stats")
        x, y = torch.randn(2, 12, generator=DRAW).double()
        x[3] = x[4]
        assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)

    def test_scores_are_compared_with_results_by_name(self) -> None:
        scores = Table(("a", "b", "c"), ("up", "down"), torch.tensor([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]))
        found = agreement_with_results(scores, {"c": 30.0, "a": 10.0, "b": 20.0, "other": 0.0})
        assert found["up", "spearman"] == pytest.approx(1) and found["down", "pearson"] == pytest.approx(-1)
        with pytest.raises(InputError, match="no result for the source 'b'"):
            agreement_with_results(scores, {"a": 1.0})
        with pytest.raises(ShapeError, match="equally long"):
            pearson([1.0], [1.0])

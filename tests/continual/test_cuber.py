"""CUBER, TRGP and GPM against their equations."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from continual.examples_continual import Net, accuracy, ready, tasks, trainer
from helpers import digest
from torch import Tensor, nn

from transfuse.continual import CUBER, GPM, TRGP
from transfuse.continual.cuber import MOVED, SCALED, SHIELDED
from transfuse.continual.subspace import SubspaceMemory, input_rows, matrix_layers, scores
from transfuse.core.errors import InputError
from transfuse.core.trainer import Trainer
from transfuse.core.watch import TransferWarning

STREAM = ((0, 1), (1, 2), (2, 3))
EVERYTHING = {"samples": 1000}


def net(**options: Any) -> Net:
    return Net(norm=False, bias=False, dropout=0.0, **options)


def weights(model: nn.Module, layers: Any) -> dict[str, Tensor]:
    return {n: model.get_submodule(n).weight.detach().flatten(1).clone() for n in layers}


def after_each_task(method: CUBER, model: nn.Module, data: Any, **options: Any) -> tuple[Trainer, list[Any]]:
    """Train, and take the weights and the deployed model at the end of every task."""
    seen: list[Any] = []

    class Noted(type(method)):  # type: ignore[misc]
        def end_task(self, task: int, run: Any) -> None:
            super().end_task(task, run)
            seen.append((weights(run["target"], self._layers), self.deploy(run["target"]).eval()))

    method.__class__ = Noted
    run = trainer(method, model, data, **options)
    run.fit()
    return run, seen


# Subspaces


def inputs(seed: int = 0, rows: int = 40, width: int = 6, scale: float = 0.3) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    spread = scale ** torch.arange(width)
    mix = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64)).Q
    return torch.randn(rows, width, generator=draw, dtype=torch.float64) * spread @ mix


def gram(rows: Tensor) -> Tensor:
    return rows.T @ rows


def test_the_scores_of_pool_and_rest_add_up_to_the_energy():
    memory = SubspaceMemory()
    memory.add("a", 0, gram(inputs()), 0.9)
    new = gram(inputs(1))
    old, energies, directions = scores(new, memory["a"].double())
    assert old.sum() + energies.sum() == pytest.approx(float(new.trace()), rel=1e-6)
    assert len(old) + len(energies) == 6 and directions.shape == (6, len(energies))


def test_a_basis_is_that_of_the_singular_value_decomposition():
    rows, memory = inputs(), SubspaceMemory()
    memory.add("a", 0, gram(rows), 0.99)
    left, values, _ = torch.linalg.svd(rows.T, full_matrices=False)
    energy = values.pow(2).cumsum(0) / values.pow(2).sum()
    rank = 1 + int((energy < 0.99).sum())
    basis = memory.basis("a", 0).double()
    assert basis.shape == (6, rank) and 1 < rank < 6
    assert torch.allclose(basis @ basis.T, left[:, :rank] @ left[:, :rank].T, atol=1e-6)


def test_a_basis_holds_its_share_of_the_energy_with_as_few_directions_as_possible():
    memory = SubspaceMemory()
    for task in range(4):
        rows = inputs(task)
        memory.add("a", task, gram(rows), 0.95)
        basis = memory.basis("a", task).double()
        shares = (rows @ basis).pow(2).sum(0) / rows.pow(2).sum()
        assert shares.sum() >= 0.95 - 1e-6 > shares.sum() - shares.min()


def test_bases_are_orthonormal_and_share_directions_of_one_pool():
    memory = SubspaceMemory()
    for task in range(5):
        memory.add("a", task, gram(inputs(task, scale=0.5)), 0.95)
    for basis in (*(memory.basis("a", t) for t in range(5)), memory["a"], memory.union("a", [0, 2, 4])):
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5)
    assert memory.union("a", range(5)).shape[1] == memory["a"].shape[1] <= 6


def test_what_a_task_adds_is_new_only_where_the_pool_is_not_enough():
    memory = SubspaceMemory()
    memory.add("a", 0, gram(inputs()), 0.99)
    before = memory["a"].shape[1]
    memory.add("a", 1, gram(inputs()), 0.99)  # the same inputs again
    assert memory["a"].shape[1] == before
    assert torch.equal(memory.basis("a", 0), memory.basis("a", 1))


def test_shared_directions_are_subtracted_once():
    memory = SubspaceMemory()
    for task in (0, 1):
        memory.add("a", task, gram(inputs()), 0.99)
    matrix = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    rest = matrix - memory.project("a", matrix, [0, 1])
    assert torch.allclose(rest @ memory.basis("a", 0), torch.zeros(()), atol=1e-5)
    assert torch.allclose(memory.project("a", matrix, [0, 1]), memory.project("a", matrix, [0]), atol=1e-5)
    assert torch.equal(memory.project("a", matrix, []), torch.zeros_like(matrix))


def test_using_all_input_directions_is_reported():
    memory = SubspaceMemory()
    with pytest.warns(TransferWarning, match="use all 6 input directions of the layer 'a'"):
        memory.add("a", 0, gram(inputs(scale=1.0)), 1.0)
    assert memory["a"].shape == (6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SubspaceMemory().add("a", 0, gram(inputs()), 0.9)


def test_inputs_that_are_all_zero_use_no_direction():
    memory = SubspaceMemory()
    memory.add("a", 0, torch.zeros(6, 6, dtype=torch.float64), 0.95)
    assert memory.basis("a", 0).shape == (6, 0)


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 1}, {"dilation": 2}, {"stride": 2, "padding": 2}])
def test_a_convolution_is_its_matrix_times_the_unfolded_inputs(options):
    layer = nn.Conv2d(2, 3, 3, bias=False, **options)
    images = torch.randn(4, 2, 7, 7)
    rows = input_rows(layer, images)
    out = layer(images)
    assert torch.allclose(rows @ layer.weight.flatten(1).T, out.flatten(2).transpose(1, 2).flatten(0, 1), atol=1e-5)


def test_tokens_are_rows_of_a_linear_layer():
    assert input_rows(nn.Linear(5, 2), torch.randn(3, 4, 5)).shape == (12, 5)


def test_only_layers_that_are_one_matrix_are_projected():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 2),
            "conv": nn.Conv2d(2, 2, 3),
            "grouped": nn.Conv2d(2, 2, 3, groups=2),
            "circular": nn.Conv2d(2, 2, 3, padding_mode="circular"),
            "same": nn.Conv2d(2, 2, 3, padding="same"),
            "norm": nn.BatchNorm2d(2),
        }
    )
    assert list(matrix_layers(model)) == ["linear", "conv"]


# Regimes


def trained(method: CUBER, data: Any, task: int = 1, steps: int = 30) -> tuple[CUBER, Any, nn.Module]:
    """A method after its first tasks, and a run that stands before task `task`."""
    model = net()
    trainer(method, model, data[:task], steps=steps, lr=0.1).fit()
    run = ready_again(method, model, data)
    return method, run, model


def ready_again(method: CUBER, model: nn.Module, data: Any) -> Any:
    state = method.state_dict()
    run = ready(method, model, data)
    heads = {f"task_heads.{name}": tensor for name, tensor in method.task_heads.state_dict().items()}
    method.load_state_dict({**state, **heads})
    run.clock.stage = len(data) - 1
    return run


def regimes(method: CUBER, task: int) -> list[int]:
    return [r for layer in method._layers for r in method.regime[f"{layer}/{task}".replace(".", "|")][0].tolist()]


def test_a_task_that_comes_again_is_in_the_third_regime():
    data = [tasks()[0], tasks()[0]]
    method, run, _ = trained(CUBER(eps1=0.1, threshold=0.9, heads="shared", **EVERYTHING), data)
    kept = {layer: method.gradients[f"{layer}/0"].clone() for layer in method._layers}
    with method.looking(run):
        again = method.gradient(1, run)
    for layer, gradient in again.items():
        assert torch.cosine_similarity(gradient.flatten(), kept[layer].flatten(), dim=0) == pytest.approx(1, abs=1e-4)
    method.begin_task(1, run)
    assert set(regimes(method, 1)) == {MOVED}


def test_flipped_labels_are_in_the_second_regime():
    x, y = tasks()[0]
    method, run, _ = trained(CUBER(eps1=0.1, threshold=0.9, heads="shared", **EVERYTHING), [(x, y), (x, 1 - y)])
    method.begin_task(1, run)
    assert set(regimes(method, 1)) == {SCALED}


def test_a_task_without_a_gradient_of_its_own_is_in_the_second_regime():
    data = [tasks()[0], tasks()[0]]
    method, run, _ = trained(CUBER(eps1=0.1, threshold=0.9, heads="shared", **EVERYTHING), data)
    for layer in method._layers:
        method.gradients[f"{layer}/0"].zero_()
    method.begin_task(1, run)
    assert set(regimes(method, 1)) == {SCALED}


def test_a_gradient_outside_of_a_subspace_is_in_the_first_regime():
    method = CUBER(eps1=0.5)
    method.memory.add("a", 0, torch.diag(torch.tensor([1.0, 0, 0, 0]).double()), 0.9)
    method.gradients["a/0"] = torch.ones(1, 4)
    assert method.detect("a", 1, torch.tensor([[0.5, 1.0, 0, 0]])) == [SHIELDED]
    assert method.detect("a", 1, torch.tensor([[0.6, 1.0, 0, 0]])) == [MOVED]
    assert method.detect("a", 1, torch.tensor([[-0.6, -1.0, 0, 0]])) == [SCALED]


def test_at_most_two_tasks_stay_beyond_the_first_regime_those_with_the_largest_projections():
    method = CUBER(eps1=0.1)
    for j in range(4):
        method.memory.add("a", j, torch.diag(torch.eye(4)[j].double()), 0.9)
        method.gradients[f"a/{j}"] = torch.ones(1, 4)
    assert method.detect("a", 4, torch.tensor([[0.5, 0.9, 0.2, 0.7]])) == [SHIELDED, MOVED, SHIELDED, MOVED]


def test_the_cosine_can_be_that_within_the_subspace():
    method = CUBER(eps1=0.1, compact=True)
    method.memory.add("a", 0, torch.diag(torch.tensor([1.0, 0, 0, 0]).double()), 0.9)
    method.gradients["a/0"] = torch.ones(1, 4) @ method.memory.basis("a", 0)
    assert method.detect("a", 1, torch.tensor([[0.6, -1.0, -1.0, 0]])) == [MOVED]  # outside it they disagree
    method.compact, method.gradients["a/0"] = False, torch.ones(1, 4)
    assert method.detect("a", 1, torch.tensor([[0.6, -1.0, -1.0, 0]])) == [SCALED]


def test_compact_memory_is_smaller_and_learns_as_well():
    run = trainer(CUBER(eps1=0.1, threshold=0.9, compact=True), net(), tasks(STREAM), steps=30)
    model = run.fit()
    rank = run.method.memory.basis("linear", 0).shape[1]
    assert run.method.gradients["linear/0"].shape == (8, rank) and rank < 36
    assert min(accuracy(model, tasks(STREAM, seed=1))) > 0.7


# The family in one code path


def same_run(one: CUBER, other: CUBER) -> None:
    runs = [trainer(m, net(), tasks(STREAM), steps=10) for m in (one, other)]
    models = [digest(run.fit()) for run in runs]
    assert models[0] == models[1]


def test_with_a_high_first_threshold_it_is_gpm_bit_by_bit():
    same_run(CUBER(eps1=1.1, threshold=0.9), GPM(threshold=0.9))


def test_with_a_high_second_threshold_it_is_trgp_bit_by_bit():
    same_run(CUBER(eps1=0.1, eps2=1.1, threshold=0.9), TRGP(eps1=0.1, threshold=0.9))


def test_trgp_with_a_high_threshold_is_gpm_bit_by_bit():
    same_run(TRGP(eps1=1.1, threshold=0.9), GPM(threshold=0.9))


def test_the_three_differ_where_they_should():
    found = [trainer(m, net(), tasks(STREAM), steps=10) for m in (CUBER(0.1, eps2=-1.0), TRGP(0.1), GPM())]
    assert len({digest(run.fit()) for run in found}) == 3
    used = [{r for t in (1, 2) for r in regimes(run.method, t)} for run in found]
    assert MOVED in used[0] and used[1] <= {SHIELDED, SCALED} and used[2] == {SHIELDED}


# Weights


def test_with_scalings_of_identity_the_effective_weights_are_the_weights():
    method, run, model = trained(TRGP(eps1=0.0, threshold=0.9), tasks(STREAM)[:2])
    method.begin_task(1, run)
    composed = method.composed(1, model)
    assert set(composed) == {"conv.weight", "linear.weight"}
    for name, weight in composed.items():
        assert torch.equal(weight, model.get_parameter(name))


def test_effective_weights_follow_the_equation():
    method, run, model = trained(TRGP(eps1=0.0, threshold=0.9), tasks(STREAM)[:2])
    method.begin_task(1, run)
    scaling = method.scalings["linear/1/0"]
    with torch.no_grad():
        scaling.add_(0.3 * torch.randn(scaling.shape))
    w, b = model.linear.weight.double(), method.memory.basis("linear", 0).double()
    expected = w + (w @ b @ scaling.double() @ b.T - w @ b @ b.T)
    assert torch.allclose(method.composed(1, model)["linear.weight"].double(), expected, atol=1e-6)


def test_scalings_are_learned_with_their_task_and_kept_with_it():
    run, seen = after_each_task(TRGP(eps1=0.0, threshold=0.9), net(), tasks(STREAM), steps=10)
    method = run.method
    scaling = method.scalings["linear/1/0"]
    assert not torch.allclose(scaling, torch.eye(len(scaling))) and not isinstance(scaling, nn.Parameter)
    x = tasks(STREAM)[1][0]
    without = run.method.deployed(run.run["target"])
    del without.own["1/linear|weight"]
    last = seen[-1][1]
    assert not torch.allclose(last(x, task=1)[:, [1, 2]], without.eval()(x, task=1)[:, [1, 2]], atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "weight_decay": 0.1}, {"optimizer": "adamw", "lr": 0.01}])
@pytest.mark.parametrize("method", [GPM(threshold=0.9), TRGP(eps1=0.1, threshold=0.9)], ids=["GPM", "TRGP"])
def test_shielded_subspaces_do_not_move_whatever_the_optimiser(method, settings):
    run, seen = after_each_task(type(method)(**vars_of(method)), net(), tasks(STREAM), steps=15, **settings)
    memory = run.method.memory
    for task in (1, 2):
        moved = {n: seen[task][0][n] - seen[task - 1][0][n] for n in run.method._layers}
        for layer, delta in moved.items():
            assert delta.norm() > 1e-3
            for j in range(task):
                assert (delta @ memory.basis(layer, j)).abs().max() < 1e-5


def vars_of(method: CUBER) -> dict[str, Any]:
    names = ("eps1", "threshold") if isinstance(method, TRGP) else ("threshold",)
    return {name: getattr(method, name) for name in names}


def test_without_projection_the_same_subspaces_move():
    """The test above can fail."""

    class Loose(GPM):
        def edit(self, task: int, gradients: Any, run: Any) -> None:
            self._before = {}

    run, seen = after_each_task(Loose(threshold=0.9), net(), tasks(STREAM), steps=15)
    delta = seen[1][0]["linear"] - seen[0][0]["linear"]
    assert (delta @ run.method.memory.basis("linear", 0)).abs().max() > 1e-3


def test_earlier_tasks_answers_change_only_through_the_energy_that_was_left_out():
    data = tasks(STREAM)
    changes = []
    for threshold in (0.8, 0.999):
        _run, seen = after_each_task(
            TRGP(eps1=0.1, threshold=threshold, threshold_step=0, **EVERYTHING), net(), data, steps=20
        )
        before, after = (seen[t][1](data[1][0], task=1)[:, [1, 2]] for t in (1, 2))
        changes.append(float((before - after).norm() / before.norm()))
    assert changes[1] < 0.05 and changes[1] < changes[0]


def test_biases_and_norms_are_each_tasks_own():
    data = tasks(STREAM)
    _run, seen = after_each_task(GPM(threshold=0.999, **EVERYTHING), Net(dropout=0.0), data, steps=15)
    before, after = (seen[t][1](data[0][0], task=0)[:, [0, 1]] for t in (0, 2))
    assert float((before - after).norm() / before.norm()) < 0.05
    model = seen[-1][1]
    assert not torch.equal(model.own["0/norm|running_mean"], model.own["2/norm|running_mean"])
    assert not torch.equal(model.own["0/linear|bias"], model.own["2/linear|bias"])
    assert "0/conv|weight" not in model.own


def test_the_first_task_is_plain_training():
    from transfuse.continual import FineTune

    one, other = net(), net()
    trainer(CUBER(), one, tasks()[:1]).fit()
    trainer(FineTune(), other, tasks()[:1]).fit()
    assert torch.equal(one.linear.weight, other.linear.weight)


# The third regime


def twice(strength: float = 0.0, steps: int = 10, **options: Any) -> tuple[Trainer, list[Any]]:
    data = [tasks()[0], tasks(seed=5)[0]]
    method = CUBER(eps1=0.1, strength=strength, threshold=0.9, heads="shared", **EVERYTHING, **options)
    return after_each_task(method, net(), data, steps=steps)


def test_directions_of_the_third_regime_move():
    run, seen = twice(eps2=-1.0)
    for layer in run.method._layers:
        assert run.method.regime[f"{layer}/1"][1].tolist() == [MOVED]
        delta = seen[1][0][layer] - seen[0][0][layer]
        assert (delta @ run.method.memory.basis(layer, 0)).norm() > 1e-3


def test_the_penalty_holds_them_the_more_the_stronger_it_is():
    moved = []
    for strength in (0.0, 0.1, 1.0):
        run, seen = twice(strength, steps=40, eps2=-1.0)
        moved.append(
            sum(float(run.method.memory.project(n, seen[1][0][n] - seen[0][0][n], [0]).norm()) for n in seen[0][0])
        )
    assert moved[0] > moved[1] > moved[2]


def test_the_penalty_is_the_norm_of_what_moved_and_its_gradient_is_finite_at_the_start():
    data = [tasks()[0], tasks()[0]]
    method, run, model = trained(CUBER(eps1=0.1, threshold=0.9, strength=3.0, heads="shared", **EVERYTHING), data)
    method.begin_task(1, run)
    batch = run.data["1"].sample(8)

    def penalty() -> Any:
        return method.loss(1, method.outputs(1, batch, run), batch, run)["moved"]

    at_start = penalty()
    assert at_start.sum.item() == 0 and at_start.weight == 3.0
    gradient = torch.autograd.grad(at_start.sum, model.linear.weight)[0]
    assert gradient.isfinite().all() and gradient.abs().max() == 0
    with torch.no_grad():
        model.linear.weight.add_(0.1 * torch.randn(model.linear.weight.shape))
        model.conv.weight.add_(0.1)
    expected = 0.0
    for layer in method._layers:
        delta = (model.get_submodule(layer).weight.flatten(1) - method.start[layer]).double().detach()
        basis = method.memory.basis(layer, 0).double()
        expected += float((delta @ basis @ basis.T).pow(2).sum().sqrt())
    assert penalty().sum.item() == pytest.approx(expected, rel=1e-5)


def test_what_is_tested_at_every_update_is_the_gradient_of_the_loss_without_the_penalty():
    found: list[tuple[Tensor, Tensor]] = []

    class Spy(CUBER):
        def aligned(self, layer: str, j: int, gradient: Tensor) -> bool:
            if layer == "linear" and self._watched is not None:
                found.append((gradient.clone(), self._watched))
            return True

        def loss(self, task: int, target: Any, batch: Any, run: Any) -> Any:
            terms = super().loss(task, target, batch, run)
            weight = run["target"].linear.weight
            self._watched = None
            if task:
                term = terms["labels"]
                self._watched = torch.autograd.grad(term.sum / term.count, weight, retain_graph=True)[0]
            return terms

    spy = Spy(eps1=0.1, threshold=0.9, strength=5.0, heads="shared", **EVERYTHING)
    spy._watched = None
    trainer(spy, net(), [tasks()[0], tasks(seed=5)[0]], steps=6).fit()
    assert len(found) == 6
    for tested, expected in found:
        assert torch.allclose(tested, expected, atol=1e-5)


def test_a_task_that_fails_the_test_is_demoted_for_good_and_its_subspace_is_frozen_from_then_on():
    states: list[list[int]] = []
    parts: list[Tensor] = []

    class Fails(CUBER):
        def aligned(self, layer: str, j: int, gradient: Tensor) -> bool:
            return self._step != 3  # and would pass again afterwards

        def edit(self, task: int, gradients: Any, run: Any) -> None:
            self._step = run.clock.step
            super().edit(task, gradients, run)

        def after_update(self, phase: Any, values: Any, run: Any) -> None:
            super().after_update(phase, values, run)
            if "linear/1" in self.regime:
                states.append(self.regime["linear/1"].flatten().tolist())
                weight = run["target"].linear.weight.detach()
                parts.append((weight @ self.memory.basis("linear", 0)).clone())

    method = Fails(eps1=0.1, threshold=0.9, heads="shared", **EVERYTHING)
    method._step = -1
    trainer(method, net(), [tasks()[0], tasks(seed=5)[0]], steps=8).fit()
    assert states == [[MOVED, MOVED]] * 3 + [[MOVED, SCALED]] * 5
    moved = [float((b - a).abs().max()) for a, b in pairwise(parts)]
    assert min(moved[:2]) > 1e-5 and max(moved[2:]) < 1e-6


def test_the_test_can_be_made_less_often():
    tested: list[int] = []

    class Spy(CUBER):
        def demote(self, layer: str, task: int, gradient: Tensor, weight: Tensor) -> None:
            tested.append(self._step)

        def edit(self, task: int, gradients: Any, run: Any) -> None:
            self._step = run.clock.step
            super().edit(task, gradients, run)

    trainer(Spy(every=4), net(), tasks()[:2], steps=9).fit()
    assert sorted(set(tested)) == [0, 4, 8]


def test_a_gradient_that_overflowed_demotes_nobody():
    data = [tasks()[0], tasks()[0]]
    method, run, model = trained(CUBER(eps1=0.1, threshold=0.9, heads="shared", **EVERYTHING), data)
    method.begin_task(1, run)
    method.demote("linear", 1, torch.full((8, 36), torch.inf), model.linear.weight.detach())
    assert method.regime["linear/1"][1].tolist() == [MOVED]


def test_stored_gradients_are_those_at_the_end_of_their_task():
    data = tasks(STREAM)
    method, model = CUBER(threshold=0.9, **EVERYTHING), net()
    trainer(method, model, data[:1], steps=20).fit()
    x, y = data[0]
    features = model.linear(model.conv(x).relu().flatten(1)).relu()
    loss = nn.functional.cross_entropy(method.task_heads(features, 0), y)
    expected = torch.autograd.grad(loss, model.linear.weight)[0]
    assert torch.allclose(method.gradients["linear/0"], expected, atol=1e-6)


def test_looking_at_a_task_moves_nothing():
    """S23"""
    method, model = CUBER(), Net()
    trainer(method, model, tasks()[:1]).fit()
    run = ready_again(method, model, tasks())
    model.train()
    before, state = digest(model), torch.get_rng_state()
    with method.looking(run):
        method.gradient(1, run), method.grams(1, run)
    assert digest(model) == before and torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())


# Targets and arguments


def test_layers_called_differently_and_shared_heads_are_projected_too():
    method = GPM(heads="shared")
    ready(method, net(), tasks())
    assert method._layers == ["conv", "linear", "fc"]
    method = GPM()
    ready(method, net(), tasks())
    assert method._layers == ["conv", "linear"]


def test_frozen_layers_are_left_alone():
    model = net()
    model.conv.requires_grad_(False)
    before = model.conv.weight.clone()
    run = trainer(CUBER(), model, tasks())
    run.fit()
    assert run.method._layers == ["linear"] and torch.equal(model.conv.weight, before)


def test_a_target_with_nothing_to_project_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    with pytest.raises(InputError, match="GPM projects linear and convolutional layers, this target has none"):
        trainer(GPM(), model, tasks()).fit()


@pytest.mark.parametrize(
    "wrong",
    [{"threshold": 0.0}, {"threshold": 1.1}, {"threshold_step": -1}, {"strength": -1}, {"samples": 0}, {"every": 0}],
)
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        CUBER(**wrong)

"""EWC, LwF and Replay: what they add to the loss is what their papers say, and really acts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from continual.examples_continual import Net, accuracy, domains, ready, tasks, trainer
from torch import Tensor, nn

from transfuse.continual import CUBER, EWC, GPM, TRGP, FineTune, Learner, LwF, Replay
from transfuse.continual.heads import key
from transfuse.core.batch import Batch
from transfuse.core.checks import fingerprint
from transfuse.core.errors import InputError
from transfuse.core.trainer import Trainer
from transfuse.losses import anchor_penalty


def history(method: Learner, term: str, net: nn.Module | None = None, **options: Any) -> list[tuple[int, float]]:
    """The raw value of a term at every update, with the task."""
    found: list[tuple[int, float]] = []

    class Spy(type(method)):  # type: ignore[misc]
        def after_update(self, phase: Any, values: dict[str, Tensor], run: Any) -> None:
            super().after_update(phase, values, run)
            if term in values:
                found.append((run.clock.stage, float(values[term])))

    method.__class__ = Spy
    trainer(method, Net(dropout=0.0) if net is None else net, tasks(), **options).fit()
    return found


# The penalty that really acts: needs 17, S22


@pytest.mark.parametrize("online", [False, True], ids=["an anchor per task", "online"])
def test_ewc_is_absent_in_the_first_task_zero_at_the_anchor_and_positive_after_a_step(online):
    values = history(EWC(online=online), "ewc")
    assert {task for task, _ in values} == {1, 2}
    second = [value for task, value in values if task == 1]
    assert second[0] == 0.0 and min(second[1:]) > 0
    third = [value for task, value in values if task == 2]
    # In the third task the first one's anchor is already left behind; online there is one, and it is where we are.
    assert third[0] == 0.0 if online else third[0] > 0


@pytest.mark.parametrize("online", [False, True], ids=["an anchor per task", "online"])
def test_ewc_has_the_value_and_gradient_of_its_formula_after_a_known_step(online):
    method, net = EWC(online=online, decay=0.5), Net(dropout=0.0)
    trainer(method, net, tasks()[:2]).fit()
    run = ready_again(method, net)
    before = {n: p.detach().double() for n, p in method.trained(net)}
    anchors = [0] if online else [0, 1]
    kept = [
        {n: (method.anchors[key(j, n)].double(), method.importance[key(j, n)].double()) for n in before}
        for j in anchors
    ]
    for p in net.parameters():
        p.data.add_(0.1)
    penalty = method.penalty(2, run)
    expected = sum(
        0.5 * float((f * (before[n] + 0.1 - a).pow(2)).sum()) for entry in kept for n, (a, f) in entry.items()
    )
    assert expected > 0 and penalty.item() == pytest.approx(expected, rel=1e-4)
    gradient = torch.autograd.grad(penalty, net.linear.weight)[0]
    by_hand = sum(
        f * (before["linear.weight"] + 0.1 - a) for entry in kept for n, (a, f) in entry.items() if n == "linear.weight"
    )
    assert gradient.abs().max() > 0 and torch.allclose(gradient.double(), by_hand, atol=1e-6)


def ready_again(method: Learner, net: nn.Module) -> Any:
    state = method.state_dict()
    run = ready(method, net, tasks())
    heads = {f"task_heads.{name}": tensor for name, tensor in method.task_heads.state_dict().items()}
    method.load_state_dict({**state, **heads})
    return run


def test_ewc_anchors_are_copies_not_the_parameters_themselves():
    method, net = EWC(), Net()
    trainer(method, net, tasks()[:1]).fit()
    anchor = method.anchors[key(0, "linear.weight")]
    assert torch.equal(anchor, net.linear.weight) and anchor.data_ptr() != net.linear.weight.data_ptr()
    net.linear.weight.data.add_(1)
    assert not torch.equal(anchor, net.linear.weight)


def test_computing_importances_moves_nothing():
    """S23: batch-norm statistics, modes, gradients and random numbers are as they were."""
    method, net = EWC(), Net()
    trainer(method, net, tasks()[:1]).fit()
    run = ready_again(method, net)
    net.train()
    before, state = fingerprint(net), torch.get_rng_state()
    with method.looking(run):
        method.fisher(0, run)
    assert fingerprint(net) == before and torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in net.modules()) and all(p.grad is None for p in net.parameters())


def test_the_fisher_information_of_logistic_regression_is_its_closed_form():
    """For logits w x with x >= 0 as the only feature: F = mean x**2 * p_c (1 - p_c) for every weight."""

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(1, 1, bias=False)
            self.fc = nn.Linear(1, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.scale(x))

    torch.manual_seed(0)
    method, net = EWC(samples=800, heads="shared"), Line()
    net.scale.weight.data.fill_(1.0)
    x = torch.rand(800, 1)
    run = ready(method, net, [(x, torch.arange(800) % 2)])
    with method.looking(run):
        found = method.fisher(0, run)["fc.weight"].flatten()
    p = net(x).softmax(1)
    expected = (x.pow(2) * p * (1 - p)).mean(0)
    assert torch.allclose(found, expected, rtol=0.2)


def test_online_ewc_decays_the_importance_of_the_past_and_keeps_one_anchor():
    found = {}
    for decay in (0.25, 1.0):
        method, net = EWC(online=True, decay=decay), Net(dropout=0.0)
        run = trainer(method, net, tasks()[:2])
        fishers: list[Tensor] = []
        original = method.fisher

        def fisher(task: int, run: Any, original: Any = original, fishers: Any = fishers) -> Any:
            fishers.append((values := original(task, run))["linear.weight"])
            return values

        method.fisher = fisher  # type: ignore[method-assign]
        run.fit()
        found[decay] = method.importance[key(0, "linear.weight")]
        assert torch.allclose(found[decay], decay * fishers[0] + fishers[1])
        assert key(1, "linear.weight") not in method.anchors
    assert not torch.allclose(found[0.25], found[1.0])


def test_the_anchor_penalty_refuses_what_does_not_belong_together():
    w = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match="need the same names"):
        anchor_penalty(w, {"v": torch.ones(2)}, w)
    with pytest.raises(ValueError, match="'w' needs one shape"):
        anchor_penalty(w, {"w": torch.ones(1)}, w)


# LwF: S21


def test_lwf_is_absent_in_the_first_task_and_teaches_from_the_second():
    for term, first in (("lwf.0", 1), ("lwf.1", 2)):
        values = history(LwF(), term)
        assert {task for task, _ in values} == set(range(first, 3))
        assert all(value > 0 for _, value in values)


def learned(method: LwF) -> tuple[Any, Net]:
    """A method and its run after one task, at the beginning of the second."""
    net = Net(dropout=0.0, norm=False)
    trainer(method, net, tasks()[:1], steps=20).fit()
    state = method.task_heads.state_dict()
    run = ready(method, net, tasks())
    with torch.no_grad():
        for name in ("0/weight", "0/bias"):
            method.task_heads[name].copy_(state[name])
    method.begin_task(1, run)
    return run, net


def lwf_terms(method: LwF, run: Any) -> dict[str, Any]:
    batch = method.as_rows(1, run.data["1"].sample(8))
    return method.loss(1, method.outputs(1, batch, run), batch, run)


def test_lwf_is_the_softened_cross_entropy_to_the_answers_before_the_task():
    method = LwF(temperature=2.0)
    run, net = learned(method)
    x = run.data["1"].sample(8).inputs

    def logits() -> Tensor:
        return method.task_heads(net.linear(net.conv(x).relu().flatten(1)).relu(), 0).detach().double()

    before = logits()
    with torch.no_grad():
        for p in (*net.parameters(), *method.task_heads.of(0)):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    now = logits()
    total = 0.0
    for b, n in zip(before.tolist(), now.tolist(), strict=True):
        p, q = ([math.exp(v / 2) for v in row] for row in (b, n))
        total -= sum(a / sum(p) * math.log(c / sum(q)) for a, c in zip(p, q, strict=True))
    assert lwf_terms(method, run)["lwf.0"].mean.item() == pytest.approx(total / 8, rel=1e-4)


def test_lwf_has_no_gradient_at_the_beginning_and_one_after_a_step():
    method = LwF()
    run, net = learned(method)

    def gradient() -> Tensor:
        return torch.autograd.grad(lwf_terms(method, run)["lwf.0"].sum, net.linear.weight)[0]

    assert gradient().abs().max() < 1e-5
    with torch.no_grad():
        net.linear.weight.add_(0.1 * torch.randn(net.linear.weight.shape))
    assert gradient().abs().max() > 1e-3


def test_lwf_teaches_something_else_when_the_old_model_changes():
    method = LwF()
    run, net = learned(method)
    with torch.no_grad():
        net.linear.weight.add_(0.1 * torch.randn(net.linear.weight.shape))

    def gradient() -> Tensor:
        return torch.autograd.grad(lwf_terms(method, run)["lwf.0"].sum, net.linear.weight)[0]

    first = gradient()
    method.old_body[key("linear.weight")].mul_(-1)
    assert not torch.allclose(gradient(), first, rtol=1e-2)


def test_lwf_with_a_shared_head_compares_the_classes_of_earlier_tasks():
    values = history(LwF(heads="shared"), "lwf.0")
    assert {task for task, _ in values} == {1, 2}
    method = LwF(heads="shared")
    ready(method, Net(), tasks())
    assert method._earlier(1).tolist() == [0, 1] and method._earlier(2).tolist() == [0, 1, 2]


def test_the_old_model_answers_in_eval_mode_and_its_statistics_stay():
    method, net = LwF(), Net(dropout=0.5)
    run = trainer(method, net, tasks()[:2])
    run.fit()
    begun = ready_again(method, net)
    net.train()
    before = fingerprint(net)
    batch = begun.data["1"].sample(8)
    one, other = method.old_answers(1, batch, begun)[0], method.old_answers(1, batch, begun)[0]
    assert torch.equal(one, other) and fingerprint(net) == before and net.training and net.drop.training


# Replay: S32


def test_replay_keeps_so_many_of_each_class_of_each_task():
    method = Replay(per_class=3, batch=4)
    trainer(method, Net(), tasks()).fit()
    pairs = list(zip(method.stored["task"].tolist(), method.stored["labels"].tolist(), strict=True))
    assert {pair: pairs.count(pair) for pair in pairs} == dict.fromkeys(
        [(0, 0), (0, 1), (1, 1), (1, 2), (2, 3), (2, 4)], 3
    )


def test_replay_keeps_all_of_a_class_that_has_fewer():
    method = Replay(per_class=20, batch=4)
    trainer(method, Net(), tasks()).fit()
    assert len(method.stored["labels"]) == 3 * 24


def test_replay_sees_at_most_so_many_stored_samples_in_an_update_and_all_of_them_in_turn():
    seen: list[tuple[int, list[int]]] = []

    class Spy(Replay):
        def values(self, memory: Batch, target: Any) -> Tensor:
            seen.append((int(memory.task.max()), memory.index.tolist()))
            return super().values(memory, target)

    trainer(Spy(per_class=3, batch=4), Net(), tasks(), steps=6).fit()
    second, third = seen[:6], seen[6:]
    assert [len(rows) for _, rows in second] == [3] * 6 and [len(rows) for _, rows in third] == [4] * 6
    for stored, updates in ((6, second[:2]), (6, second[2:4]), (12, third[:3]), (12, third[3:])):
        assert sorted(row for _, rows in updates for row in rows) == list(range(stored))
    seen.clear()
    trainer(Spy(per_class=1, batch=50), Net(), tasks(), steps=6).fit()
    assert [len(rows) for _, rows in seen] == [2] * 6 + [4] * 6  # as many as there are


def test_replayed_samples_are_scored_by_the_heads_of_their_tasks():
    method, net = Replay(), Net(dropout=0.0)
    run = ready(method, net, tasks())
    data = tasks()
    x, y = torch.cat([data[0][0][:2], data[2][0][:2]]), torch.cat([data[0][1][:2], data[2][1][:2]])
    memory = Batch(inputs=x, labels=y, task=torch.tensor([0, 0, 2, 2]))
    features = run("target", memory)
    values = method.values(memory, features)
    for i, (task, row) in enumerate(((0, 0), (0, 0), (2, 0), (2, 0))):
        logits = method.task_heads(features.features["penultimate"][i : i + 1], task)
        assert values[i].item() == pytest.approx(float(-logits.log_softmax(-1)[0, row].detach()), rel=1e-5)


def test_replay_refuses_inputs_of_several_parts():
    class Named(Net):
        def forward(self, pixels: Tensor, gain: Tensor) -> Tensor:
            return super().forward(pixels * gain[:, None, None, None])

    data = [{"pixels": x, "gain": torch.ones(len(x)), "labels": y} for x, y in tasks()]
    with pytest.raises(InputError, match="Replay stores tensors"):
        trainer(Replay(), Named(), data).fit()


# All of them: a floor


def forgotten(method: Learner) -> float:
    """What is lost of the first task's accuracy: every task has the same classes, and inputs permuted anew."""
    first: list[float] = []
    held_out = domains(50, seed=51)

    def look(run: Trainer, record: Any) -> None:
        if run.clock.stage == 0 and run.clock.step == run.clock.steps:
            first.append(accuracy(run.method.deploy(run.target), held_out)[0])

    net = Net(dropout=0.0, norm=False, seed=1)
    end = accuracy(trainer(method, net, domains(30, seed=1), steps=100, listener=look).fit(), held_out)[0]
    return first[0] - end


@pytest.fixture(scope="module")
def fine_tuning() -> float:
    return forgotten(FineTune(heads="shared"))


@pytest.mark.parametrize(
    "method",
    [
        EWC(strength=3.0, heads="shared"),
        EWC(strength=3.0, online=True, heads="shared"),
        LwF(heads="shared"),
        Replay(per_class=5, heads="shared"),
        GPM(heads="shared"),
        TRGP(heads="shared"),
        CUBER(heads="shared"),
    ],
    ids=repr,
)
def test_each_forgets_less_than_fine_tuning(method, fine_tuning):
    """Need 17: what a method adds is seen in what it is for, not only in its value."""
    assert fine_tuning > 0.3
    assert forgotten(method) < fine_tuning - 0.1


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: EWC(strength=-1), "strength"),
        (lambda: EWC(samples=0), "samples"),
        (lambda: EWC(decay=0), "decay"),
        (lambda: LwF(temperature=0), "temperature"),
        (lambda: LwF(strength=-1), "strength"),
        (lambda: Replay(per_class=0), "per_class"),
        (lambda: Replay(batch=0), "batch"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(build, word):
    with pytest.raises(InputError, match=word):
        build()

"""Networks that learn at once: what is common to DML, BD-KD and whatever else stands on `Online`; and these two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CNN, assert_equal_gradients, digest, images, language_model, ragged_tokens
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, MethodError, VocabularyError
from transfuse.core.method import Method
from transfuse.core.outputs import Outputs
from transfuse.core.run import Run
from transfuse.core.streams import as_data
from transfuse.core.trainer import Trainer
from transfuse.core.training import Training
from transfuse.distill import BDKD, DML, KD, Online
from transfuse.losses import balanced_kl, cross_entropy, kl_divergence

METHODS: dict[str, Callable[[], Online]] = {"DML": DML, "BDKD": BDKD, "smooth": lambda: BDKD(smooth=0.1)}


def labelled(count: int = 12) -> tuple[Tensor, Tensor]:
    inputs, labels = images(count)
    return inputs, labels.where(labels != -100, torch.arange(count) % 3)


def networks(count: int = 2, **options: Any) -> dict[str, CNN]:
    sources = ["source"] if count == 2 else [f"source.{i}" for i in range(count - 1)]
    return {role: CNN(width=8 - i, seed=i, **options) for i, role in enumerate([*sources, "target"])}


def trainer(method: Method, roles: dict[str, nn.Module], data: Any = None, **options: Any) -> Trainer:
    run = {k: options.pop(k) for k in ("folder", "listener", "shuffled", "sync", "task") if k in options}
    settings = {"steps": 6, "batch_size": 6, "optimizer": "sgd", "lr": 0.1, "checkpoint_every": 0.0} | options
    return Trainer(method, roles, {"data": as_data(labelled() if data is None else data)}, Training(**settings), **run)


def first_gradients(method: Method, roles: dict[str, nn.Module], **options: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def take(run: Trainer, record: Any) -> None:
        for role, model in roles.items():
            found.update({f"{role}.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    settings = {"steps": 1, "batch_size": 12, "shuffle": False, "weight_decay": 0.0} | options
    trainer(method, roles, listener=take, **settings).fit()
    return found


def objective(method: Online, role: str, outputs: dict[str, Outputs], batch: Batch) -> Tensor:
    return sum(term.weight * term.mean for term in method.loss(role, outputs, batch, Clock()).values())


# What holds for every method


@pytest.mark.parametrize("name", METHODS)
def test_one_step_on_the_sum_is_the_step_of_every_network_on_its_own_loss(name):
    found = first_gradients(METHODS[name](), networks(3))
    roles, (inputs, labels) = networks(3), labelled()
    batch = Batch(inputs=inputs, labels=labels)
    expected = {}
    for role, model in roles.items():
        outputs = {r: Outputs(m(inputs) if r == role else m(inputs).detach()) for r, m in roles.items()}
        grads = torch.autograd.grad(objective(METHODS[name](), role, outputs, batch), list(model.parameters()))
        expected |= {f"{role}.{n}": g for (n, _), g in zip(model.named_parameters(), grads, strict=True)}
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize("name", METHODS)
def test_no_loss_reaches_the_parameters_of_another_network(name):
    roles, (inputs, labels) = networks(3), labelled()
    run = Run(roles, {})
    own = {role: run(role, Batch(inputs=inputs)) for role in roles}
    shown = {role: run.shown(role, outputs) for role, outputs in own.items()}
    for role in roles:
        objective(METHODS[name](), role, {**shown, role: own[role]}, Batch(inputs=inputs, labels=labels)).backward()
        for other, model in roles.items():
            assert all((p.grad is not None) == (other == role) for p in model.parameters())
            model.zero_grad()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_every_network_moves_and_runs_once_per_batch(name, count):
    roles = networks(count)
    before = {role: digest(model) for role, model in roles.items()}
    run = trainer(METHODS[name](), roles, steps=4)
    run.fit()
    for role, model in roles.items():
        assert digest(model) != before[role]
        assert sum(model.calls) == 4, "forward passes in train mode"


@pytest.mark.parametrize("name", METHODS)
def test_networks_that_agree_teach_each_other_nothing(name):
    roles, (inputs, labels) = {"source": CNN(), "target": CNN()}, labelled()
    outputs = {role: Outputs(model(inputs)) for role, model in roles.items()}
    for role in roles:
        terms = METHODS[name]().loss(role, outputs, Batch(inputs=inputs, labels=labels), Clock())
        assert all(term.mean.abs() < 1e-6 for n, term in terms.items() if n != "labels")
        assert terms["labels"].mean > 0.1


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_change_no_gradient(name):
    whole = first_gradients(METHODS[name](), networks(3))
    assert_equal_gradients(whole, first_gradients(METHODS[name](), networks(3), micro_batch=5))


@pytest.mark.parametrize("columns", [1, 6])
@pytest.mark.parametrize("name", METHODS)
def test_of_texts_only_scored_tokens_count(name, columns):
    def gradients(extra: int) -> dict[str, Tensor]:
        roles = {"source": language_model(1, dim=12), "target": language_model(0)}
        data = {key: nn.functional.pad(value, (0, extra)) for key, value in ragged_tokens().items()}
        return first_gradients(METHODS[name](), roles, data=data, task="language-model")

    assert_equal_gradients(gradients(0), gradients(columns))


class Killed(BaseException):
    pass


def kill_at(update: int) -> Callable[..., None]:
    def listener(run: Trainer, record: Any) -> None:
        if run.updates == update:
            raise Killed

    return listener


@pytest.mark.parametrize("update", [1, 4])
@pytest.mark.parametrize("name", METHODS)
def test_every_network_is_resumed_bit_equal(name, update, tmp_path):
    def run(**options: Any) -> tuple[Trainer, dict[str, CNN]]:
        roles = networks(3, norm=True, dropout=0.3)
        return trainer(METHODS[name](), roles, optimizer="adamw", clip=0.5, **options), roles

    whole, expected = run()
    whole.fit()
    with pytest.raises(Killed):
        run(folder=tmp_path, listener=kill_at(update))[0].fit()
    torch.manual_seed(99)
    resumed, roles = run(folder=tmp_path)
    resumed.fit(resume=True)
    assert {r: digest(m) for r, m in roles.items()} == {r: digest(m) for r, m in expected.items()}
    assert resumed.history == whole.history


def test_clipping_one_network_leaves_the_others_their_gradient():
    roles = networks()
    with torch.no_grad():
        roles["source"].fc.weight.mul_(50)  # a network with a large gradient
    norms = {}

    def take(run: Trainer, record: Any) -> None:
        for role, model in roles.items():
            norms[role] = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()

    trainer(DML(), roles, steps=1, clip=0.05, listener=take).fit()
    assert norms == pytest.approx({"source": 0.05, "target": 0.05}, rel=1e-3)


def test_in_the_control_arm_a_source_learns_its_own_labels_and_shows_other_samples_outputs():
    inputs, labels = labelled()
    run = Run(networks(3), {}, shuffled=True)
    batch = Batch(inputs=inputs, labels=labels)
    own = run("source.0", batch, own=True)
    assert torch.equal(own.logits, run["source.0"](inputs))
    shown = run.shown("source.0", own).logits
    assert not shown.requires_grad
    moved = (shown != own.logits).any(1)
    assert moved.all()
    assert torch.equal(shown.sort(0).values, own.logits.sort(0).values)
    assert torch.equal(run.shown("target", own).logits, own.logits)


def test_methods_of_networks_that_learn_at_once_add_up():
    summed = first_gradients(DML() + 0.5 * BDKD(), networks())
    one, other = first_gradients(DML(), networks()), first_gradients(BDKD(), networks())
    assert_equal_gradients(summed, {name: one[name] + 0.5 * other[name] for name in one})
    with pytest.raises(MethodError, match="do not share a loss"):
        DML() + KD()


def test_unlabelled_samples_are_taught_by_the_others_alone():
    inputs, labels = images()  # one in three has no label
    run = trainer(DML(), networks(), (inputs, labels), steps=1, batch_size=12)
    run.fit()
    terms = run.history[-1]["terms"]
    with torch.no_grad():
        logits = networks()["target"](inputs)
    known = labels != -100
    assert terms["target/labels"]["raw"] == pytest.approx(
        nn.functional.cross_entropy(logits[known], labels[known]).item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("roles", "data", "words"),
    [
        ({"target": CNN()}, None, "several networks at once"),
        (networks(), images()[0], "needs labelled data"),
        ({"source": CNN().requires_grad_(False), "target": CNN()}, None, "no parameter that requires a gradient"),
        (networks(norm=True), (labelled()[0][:1], labelled()[1][:1]), "batch of one sample"),
    ],
    ids=["alone", "no labels", "frozen", "one sample"],
)
def test_says_before_training_what_it_cannot_use(roles, data, words):
    with pytest.raises(InputError, match=words):
        trainer(DML(), roles, data, batch_size=1).fit()


def test_networks_that_share_parameters_are_refused():
    roles = networks()
    roles["source"].layer1 = CNN(width=roles["target"].layer1.out_channels).layer1
    roles["target"].layer1 = roles["source"].layer1
    with pytest.raises(InputError, match="'source' and 'target' share parameters"):
        trainer(BDKD(), roles).fit()


def test_networks_that_count_other_classes_are_refused():
    roles = networks(3)
    roles["source.1"].fc = nn.Linear(roles["source.1"].fc.in_features, 4)
    with pytest.raises(VocabularyError, match="has 3 classes"):
        trainer(BDKD(), roles).fit()


# Deep mutual learning


def test_dml_of_three_averages_the_divergence_from_the_other_two():
    inputs, labels = labelled()
    outputs = {role: Outputs(model(inputs)) for role, model in networks(3).items()}
    a, b, c = (outputs[role].logits for role in ("source.0", "source.1", "target"))
    terms = DML(temperature=2.0).loss("source.1", outputs, Batch(inputs=inputs, labels=labels), Clock())
    mutual = (kl_divergence(b, a, temperature=2.0) + kl_divergence(b, c, temperature=2.0)) / 2
    assert terms["mutual"].mean.item() == pytest.approx(mutual.mean().item())
    assert terms["labels"].mean.item() == pytest.approx(cross_entropy(b, labels).mean().item())


# BD-KD


def test_bdkd_teaches_the_student_by_the_balance_and_the_teacher_by_the_mutual_term():
    inputs, labels = labelled()
    batch = Batch(inputs=inputs, labels=labels)
    outputs = {role: Outputs(model(inputs)) for role, model in networks().items()}
    t, s = outputs["source"].logits, outputs["target"].logits
    method = BDKD(temperature=3.0, nu=2.0, gamma=0.5)
    student = cross_entropy(s, labels) + balanced_kl(s, t, nu=2.0, temperature=3.0)
    teacher = cross_entropy(t, labels) + 0.5 * kl_divergence(t, s, temperature=3.0)
    assert objective(method, "target", outputs, batch).item() == pytest.approx(student.mean().item())
    assert objective(method, "source", outputs, batch).item() == pytest.approx(teacher.mean().item())


def test_the_teacher_of_bdkd_learns_as_in_deep_mutual_learning():
    inputs, labels = labelled()
    outputs = {role: Outputs(model(inputs)) for role, model in networks().items()}
    ours = BDKD(temperature=2.0, gamma=1.0).loss("source", outputs, Batch(labels=labels), Clock())
    mutual = DML(temperature=2.0).loss("source", outputs, Batch(labels=labels), Clock())
    assert ours.keys() == mutual.keys()
    assert all(torch.equal(ours[name].sum, mutual[name].sum) for name in ours)


def test_a_middle_network_is_student_of_the_larger_and_teacher_of_the_smaller():
    inputs, labels = labelled()
    outputs = {role: Outputs(model(inputs)) for role, model in networks(4).items()}
    logits = [o.logits for o in outputs.values()]
    terms = BDKD().loss("source.2", outputs, Batch(labels=labels), Clock())
    larger = (
        balanced_kl(logits[2], logits[0], temperature=3.0) + balanced_kl(logits[2], logits[1], temperature=3.0)
    ) / 2
    assert terms["balanced"].mean.item() == pytest.approx(larger.mean().item())
    assert terms["mutual"].mean.item() == pytest.approx(
        kl_divergence(logits[2], logits[3], temperature=3.0).mean().item()
    )


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"nu": 0.9}, {"gamma": -1.0}, {"smooth": 0.0}])
def test_bdkd_refuses_settings_out_of_range(wrong):
    with pytest.raises(InputError, match=f"BDKD: {next(iter(wrong))} is"):
        BDKD(**wrong)
    with pytest.raises(InputError, match="DML: temperature is"):
        DML(temperature=0.0)


def test_deploys_the_target_itself():
    roles = networks()
    assert trainer(BDKD(), roles).fit() is roles["target"]

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CNN, batch, digest, first_gradients, images, language_model, make, trainer
from helpers import METHODS as ALL
from torch import Tensor, nn

from transfuse.core.clock import Clock, Linear
from transfuse.core.composition import Then
from transfuse.core.errors import CapabilityError, InputError, MethodError, VocabularyError
from transfuse.core.method import Bag, Method
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Observe, Phase, Stage
from transfuse.core.streams import Generated, Iterated
from transfuse.core.sync import Sync
from transfuse.core.teacher import LogitsTeacher, as_teacher, require
from transfuse.core.training import Training
from transfuse.distill import KD, RKD, Distillation, Hints, Labels
from transfuse.losses import Term

METHODS = [cls for cls in ALL if "classification" in cls.card.tasks]
"""Those that images can be learned with."""


def pair(**options: Any) -> tuple[CNN, CNN]:
    return CNN(norm=True, dropout=0.2, seed=1, **options), CNN(width=6, norm=True, seed=2)


ALL_TOGETHER: dict[str, Callable[[], Method]] = {
    **{cls.__name__: lambda cls=cls: make(cls) for cls in METHODS},
    "sum of all": lambda: sum((make(cls) for cls in METHODS[1:]), make(METHODS[0])),
}

# One pass per step, and nothing moves that should not


@pytest.mark.parametrize("name", ALL_TOGETHER)
def test_one_forward_per_model_and_step(name):
    student, teacher = pair()
    counts: list[tuple[int, int]] = []
    run = trainer(ALL_TOGETHER[name](), student, teacher, images(), steps=5, micro_batch=3)
    run.listener = lambda r, record: counts.append((len(student.calls), len(teacher.calls)))
    run.fit()
    passes = [(s1 - s0, t1 - t0) for (s0, t0), (s1, t1) in itertools.pairwise(counts)]
    assert passes == [(2, 2 if run.method.uses_source else 0)] * 4  # two micro-batches each
    assert student.calls.count(True) == 10  # setting up runs in eval mode


@pytest.mark.parametrize("name", ALL_TOGETHER)
def test_the_teacher_is_bit_identical_afterwards_and_never_in_train_mode(name):
    student, teacher = pair()
    teacher.train()
    before, own = digest(teacher), digest(student)
    trainer(ALL_TOGETHER[name](), student, teacher, images()).fit()
    assert digest(teacher) == before
    assert not any(teacher.calls)
    assert digest(student) != own
    assert all(p.grad is None for p in teacher.parameters())


class Backbone(nn.Module):
    """A model on a given body, with a head of its own."""

    def __init__(self, body: nn.Module, seed: int):
        super().__init__()
        self.body = body
        torch.manual_seed(seed)
        self.fc = nn.Linear(8, 3)
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append((self.training, all(m.training == self.training for m in self.modules())))
        return self.fc(self.body(x).mean((2, 3)))


def test_modes_are_right_where_teacher_and_student_share_a_submodule():
    body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Dropout(0.5)).requires_grad_(False)
    student, teacher = Backbone(body, 0), Backbone(body, 1)
    before = digest(teacher)
    trainer(KD(), student, teacher, images(), steps=3).fit()
    assert teacher.modes[-3:] == [(False, True)] * 3
    assert student.modes[-3:] == [(True, True)] * 3
    assert digest(teacher) == before


def test_statistics_of_a_learning_model_move_once_per_forward():
    student, teacher = pair()
    trainer(KD(), student, teacher, images(), steps=4, micro_batch=3).fit()
    assert student.norm.num_batches_tracked == 8
    assert teacher.norm.num_batches_tracked == 0


class Adversary(Method):
    """Two phases that both run the target in train mode; only one of them trains it. And it looks between steps."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Linear(3, 1)

    def loss(self, batches: Any, run: Any) -> dict[str, Term]:
        return {"out": Term.of(self.critic(run("target", batches["data"]).logits).square().squeeze(1))}

    def after_update(self, phase: Phase, values: Any, run: Any) -> None:
        run("target", batch(), grad=False)

    def stage(self, i: int, run: Any) -> Stage:
        critic = Phase("critic", self.loss, self.critic.parameters(), times=2)
        target = Phase("target", self.loss, run["target"].parameters())
        return Stage({"data": run.data["data"]}, [Observe("look", self.loss), critic, target])


def test_statistics_stay_where_a_model_does_not_learn():
    student = CNN(norm=True)
    trainer(Adversary(), student, None, images(), steps=5).fit()
    assert student.norm.num_batches_tracked == 5
    assert student.training


@pytest.mark.parametrize("cls", METHODS, ids=lambda c: c.__name__)
def test_the_global_generators_are_untouched(cls):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    run = trainer(make(cls), *pair(), images(), validate=lambda m: float(torch.rand(())))
    run.fit()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_a_run_depends_on_its_seed_and_not_on_the_global_one():
    def run(seed: int) -> str:
        torch.seed()
        student, teacher = pair()
        return digest(trainer(KD(), student, teacher, images(), seed=seed).fit())

    assert run(0) == run(0) != run(1)


def public(method: Method) -> dict[str, Any]:
    """Plain attributes of a method and its parts: what a checkpoint does not hold."""
    return {
        f"{name}.{key}": copy.deepcopy(value)
        for name, module in method.named_modules()
        if isinstance(module, Method)
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "training" and not isinstance(value, nn.Module | Tensor)
    }


@pytest.mark.parametrize("name", ALL_TOGETHER)
def test_no_plain_attribute_changes_during_training(name):
    run = trainer(ALL_TOGETHER[name](), *pair(), images())
    seen: list[dict[str, Any]] = []
    run.listener = lambda r, record: seen.append(public(r.method))
    run.fit()
    assert all(state == seen[0] for state in seen)


def test_the_audit_of_attributes_can_see():
    class Forgetful(KD):
        count = 0

        def after_update(self, phase: Phase, values: Any, run: Any) -> None:
            self.count += 1

    run = trainer(Forgetful(), *pair(), images())
    seen: list[dict[str, Any]] = []
    run.listener = lambda r, record: seen.append(public(r.method))
    run.fit()
    assert seen[0] != seen[-1]


# What is refused


def test_fit_works_once():
    run = trainer(Labels(), CNN(), None, images())
    run.fit()
    with pytest.raises(InputError, match="has run already"):
        run.fit()


def test_a_phase_without_parameters_is_refused():
    frozen = CNN().requires_grad_(False)
    with pytest.raises(MethodError, match="phase 'student' has no parameter that requires a gradient"):
        trainer(Labels(), frozen, None, images()).fit()
    with pytest.raises(MethodError, match="phase 'p' has no parameter"):
        Phase("p", lambda b, r: {}, iter(()))
    parameter = nn.Parameter(torch.zeros(1))
    with pytest.raises(MethodError, match="lists a parameter twice"):
        Phase("p", lambda b, r: {}, [{"params": [parameter]}, {"params": [parameter]}])


def test_an_iterator_of_parameters_is_read_once():
    model = CNN()
    phase = Phase("p", lambda b, r: {}, model.parameters())
    assert phase.params == list(model.parameters())
    assert phase.groups[0]["params"] == phase.params


def test_a_side_parameter_that_no_phase_trains_is_refused():
    class Orphan(KD):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def stage(self, i: int, run: Any) -> Stage:
            return Stage({"data": run.data["data"]}, [Phase("student", self.losses, run["target"].parameters())])

    with pytest.raises(MethodError, match=r"Orphan: no phase of stage 0 trains method\.scale"):
        trainer(Orphan(), *pair(), images()).fit()


class MovesTeacher(KD):
    def after_update(self, phase: Phase, values: Any, run: Any) -> None:
        with torch.no_grad():
            run["source"].fc.bias.add_(0.5)


def test_a_role_that_moves_undeclared_is_named():
    with pytest.raises(MethodError, match=r"the role 'source' moved \(fc\.bias\) although no phase trains it"):
        trainer(MovesTeacher(), *pair(), images()).fit()


def test_a_role_that_is_declared_may_move():
    class Declared(MovesTeacher):
        keeps = ("source",)

    trainer(Declared(), *pair(), images()).fit()


def test_unknown_roles_and_taps_of_missing_roles_are_refused():
    with pytest.raises(InputError, match="this run has no 'source': known: target"):
        trainer(Hints("layer2", "layer2"), CNN(), None, images()).fit()


def test_different_classes_are_refused_before_training():
    teacher = CNN()
    teacher.fc = nn.Linear(8, 5)
    student = CNN()
    with pytest.raises(VocabularyError, match=r"the target has 3 classes .* the source has 5 .* Match features"):
        trainer(KD(), student, teacher, images()).fit()
    assert not any(student.calls)


def test_labels_without_labels_are_refused_before_training():
    with pytest.raises(InputError, match="Labels needs labels, this data has none"):
        trainer(Labels(), CNN(), None, images()[0]).fit()


def test_labels_out_of_range_are_refused_before_training():
    with pytest.raises(InputError, match=r"labels must lie in 0\.\.2"):
        trainer(Labels(), CNN(), None, (images()[0], torch.full((12,), 3))).fit()


def test_data_without_a_length_needs_steps():
    def endless() -> Any:
        while True:
            yield images(6)

    with pytest.raises(InputError, match="epochs mean nothing: say steps"):
        trainer(Labels(), CNN(), None, endless, epochs=2).fit()
    run = trainer(Labels(), CNN(), None, endless, steps=3)
    run.fit()
    assert run.updates == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "epochs=... or steps=..., one of them"),
        ({"epochs": 1, "steps": 1}, "one of them"),
        ({"steps": 1, "lr": -1}, "lr is -1, it must be positive"),
        ({"steps": 1, "ema": 1.0}, "ema is 1.0"),
        ({"steps": 1, "optimizer": "adamv"}, "did you mean 'adam' or 'adamw'"),
        ({"steps": 1, "schedule": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_unusable_settings_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        Training(**wrong)


def test_every_setting_is_documented():
    for field in fields(Training):
        assert field.name in Training.__doc__


def test_a_source_must_give_what_a_method_needs():
    teacher = as_teacher(lambda x: x.mean((2, 3)).expand(-1, 3))
    assert isinstance(teacher, LogitsTeacher)
    trainer(KD(), CNN(), teacher, images()).fit()
    with pytest.raises(CapabilityError, match=r"RKD needs 'features' .* LogitsTeacher gives full\. .*: KD"):
        require(teacher, ("features",), "RKD", "KD")
    with pytest.raises(InputError, match="a source is a model or a function"):
        as_teacher(3)


# Stages


class Recorder(Method):
    """Three stages; notes when its hooks are called."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = Bag()
        self._calls: list[str] = []

    def begin_stage(self, i: int, run: Any) -> bool:
        if i == 3:
            return False
        self.bag[f"begun{i}"] = self.bag[f"begun{i}"] + 1 if f"begun{i}" in self.bag else torch.ones(1)
        self._calls.append(f"begin {i}")
        return True

    def end_stage(self, i: int, run: Any) -> None:
        self._calls.append(f"end {i}")

    def begin_epoch(self, run: Any) -> None:
        self._calls.append(f"epoch {run.clock.epoch}")

    def loss(self, batches: Any, run: Any) -> dict[str, Term]:
        return {"x": Term.of(run("target", batches["data"]).logits.square().mean(1))}

    def stage(self, i: int, run: Any) -> Stage:
        return Stage({"data": run.data["data"]}, [Phase("p", self.loss, run["target"].parameters())], epochs=2)


def test_hooks_are_called_in_order():
    method = Recorder()
    run = trainer(method, CNN(), None, images())
    run.fit()
    assert method._calls == [c for i in range(3) for c in (f"begin {i}", "epoch 0", "epoch 1", f"end {i}")]
    assert run.updates == 12


def test_a_stage_is_begun_once_over_all_resumes(tmp_path):
    class Killed(BaseException):
        pass

    def run(kill: int | None) -> Method:
        def listener(t: Any, record: Any) -> None:
            if t.updates == kill:
                raise Killed

        method = Recorder()
        fitting = trainer(method, CNN(), None, images(), folder=tmp_path, listener=listener)
        if kill is None:
            fitting.fit(resume=True)
        else:
            with pytest.raises(Killed):
                fitting.fit(resume=True)
        return method

    for kill in (1, 2, 5, 6, 9):
        run(kill)
    method = run(None)
    assert [float(method.bag[f"begun{i}"]) for i in range(3)] == [1, 1, 1]


def test_data_without_a_length_is_one_epoch():
    class Epochs(KD):
        def begin_epoch(self, run: Any) -> None:
            begun.append(run.clock.step)

    begun: list[int] = []
    trainer(Epochs(), *pair(), lambda: iter([images(6)] * 3), steps=3).fit()
    assert begun == [0]


def test_observing_sees_every_batch_without_gradients():
    class Mean(Method):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(1))

        def look(self, batches: Any, run: Any) -> None:
            assert not torch.is_grad_enabled()
            self.total += batches["data"].inputs.sum()

        def stage(self, i: int, run: Any) -> Stage:
            return Stage({"data": run.data["data"]}, [Observe("look", self.look)], epochs=1)

    method, student = Mean(), CNN()
    before = digest(student)
    run = trainer(method, student, None, images(), micro_batch=4)
    run.fit()
    assert method.total.item() == pytest.approx(images()[0].sum().item(), rel=1e-5)
    assert digest(student) == before


def test_a_trainer_runs_inside_an_observing_one():
    class Federated(Method):
        keeps = ("target",)

        def round(self, batches: Any, run: Any) -> None:
            trainer(Labels(), run["target"], None, images(), sync=Sync(), steps=2, seed=run.clock.step).fit()

        def stage(self, i: int, run: Any) -> Stage:
            return Stage({"clients": Generated(3)}, [Observe("round", self.round)], epochs=1)

    student = CNN()
    before = digest(student)
    outer = trainer(Federated(), student, None, images())
    outer.fit()
    assert outer.updates == 3
    assert digest(student) != before
    expected = CNN()
    for seed in range(3):
        trainer(Labels(), expected, None, images(), steps=2, seed=seed).fit()
    assert digest(student) == digest(expected)


def test_a_sequence_splits_the_callers_updates():
    lengths: list[tuple[int, int]] = []

    def note(run: Any, record: Any) -> None:
        lengths.append((run.clock.stage, run.clock.steps))

    method = Then(Hints("layer2", "layer2"), KD() + Labels(), shares=(0.25, 0.75))
    run = trainer(method, *pair(), images(), steps=12, listener=note)
    run.fit()
    assert run.updates == 12
    assert sorted(set(lengths)) == [(0, 3), (1, 9)]
    assert repr(method) == "Then(Hints('layer2', 'layer2'), KD() + Labels(), shares=(0.25, 0.75))"
    with pytest.raises(MethodError, match="one share per method, adding up to 1"):
        Then(KD(), Labels(), shares=(0.5, 0.6))


def test_a_sequence_gives_stages_with_a_length_of_their_own_all_of_it():
    run = trainer(Then(Recorder(), KD()), *pair(), images(), steps=4)
    run.fit()
    assert run.updates == 3 * 4 + 2


def test_a_sequence_starts_from_its_first_method_in_every_run():
    method = Then(Hints("layer2", "layer2"), KD())
    one = trainer(method, *pair(), images())
    one.fit()
    again = trainer(method, *pair(), images())
    assert digest(again.fit()) == digest(one.target)


# Phases


class Two(Distillation):
    """Two terms on two outputs of one model, for hand-computed gradients."""

    uses_source = False

    def __init__(self, **phase: Any):
        super().__init__()
        self._phase = phase

    def loss(self, student: Outputs, teacher: Outputs, batch: Any, clock: Clock) -> dict[str, Term]:
        a, b = student.logits[:, 0], student.logits[:, 1]
        return {"a": 2.0 * Term.of(a.square()), "b": Term.of((b - 1).square())}

    def stage(self, i: int, run: Any) -> Stage:
        shared = list(run["target"].layer1.parameters()) if "combine" in self._phase else ()
        phase = Phase("student", self.losses, run["target"].parameters(), shared=shared, **self._phase)
        return Stage({"data": run.data["data"]}, [phase])


def by_hand(model: CNN, *terms: str) -> dict[str, Tensor]:
    logits = model(images()[0])
    values = {"a": logits[:, 0].square().mean(), "b": (logits[:, 1] - 1).square().mean()}
    total = sum(values[t] for t in terms)
    grads = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return {f"CNN.{n}": g for (n, _), g in zip(model.named_parameters(), grads, strict=True) if g is not None}


def test_combine_decides_the_shared_parameters_from_raw_rows_and_no_others():
    rows_seen: list[str] = []

    def combine(rows: dict[str, list[Tensor]], run: Any) -> list[Tensor]:
        rows_seen.extend(rows)
        return [10 * a - b for a, b in zip(rows["a"], rows["b"], strict=True)]

    found = first_gradients(Two(combine=combine), CNN(), None, images(), micro_batch=5)
    a, b = by_hand(CNN(), "a"), by_hand(CNN(), "b")
    assert rows_seen == ["a", "b"]
    for name in found:
        expected = 10 * a[name] - b[name] if "layer1" in name else 2 * a[name] + b[name]
        assert torch.allclose(found[name], expected, atol=1e-6), name


def test_combine_and_edit_know_the_raw_value_of_every_term_over_the_whole_update():
    seen: list[dict[str, float]] = []

    def combine(rows: dict[str, list[Tensor]], run: Any) -> list[Tensor]:
        seen.append({name: float(value) for name, value in run.values.items()})
        return rows["a"]

    first_gradients(Two(combine=combine), CNN(), None, images(), micro_batch=5)
    logits = CNN()(images()[0])
    expected = {"a": logits[:, 0].square().mean().item(), "b": (logits[:, 1] - 1).square().mean().item()}
    assert seen == [pytest.approx(expected)]


def test_a_group_may_scale_the_learning_rate_that_the_caller_asked_for():
    class Slower(Two):
        def stage(self, i: int, run: Any) -> Stage:
            target = run["target"]
            groups = [{"params": target.layer1.parameters(), "lr_scale": 0.1}, {"params": target.fc.parameters()}]
            return Stage({"data": run.data["data"]}, [Phase("student", self.losses, groups)])

    plain, slow = CNN(), CNN()
    for method, model in ((Two(), plain), (Slower(), slow)):
        trainer(method, model, None, images(), steps=1, batch_size=12, lr=0.1, weight_decay=0.0).fit()
    start = CNN()
    for layer, factor in (("layer1", 0.1), ("fc", 1.0)):
        before, full, part = (getattr(m, layer).weight.detach() for m in (start, plain, slow))
        assert torch.allclose(part - before, factor * (full - before), atol=1e-6)
        assert (full - before).abs().max() > 1e-4


def test_edit_changes_gradients_before_clipping():
    def in_place(grads: dict[nn.Parameter, Tensor], run: Any) -> None:
        for g in grads.values():
            g.mul_(3)

    def anew(grads: dict[nn.Parameter, Tensor], run: Any) -> dict[nn.Parameter, Tensor]:
        return {p: 3 * g for p, g in grads.items()}

    plain = first_gradients(Two(), CNN(), None, images())
    for edit in (in_place, anew):
        edited = first_gradients(Two(edit=edit), CNN(), None, images())
        assert all(torch.allclose(edited[n], 3 * g) for n, g in plain.items())
        clipped = first_gradients(Two(edit=edit), CNN(), None, images(), clip=0.1)
        assert torch.cat([g.flatten() for g in clipped.values()]).norm().item() == pytest.approx(0.1, rel=1e-3)


def test_a_phase_repeats_on_the_same_batches():
    reps: list[tuple[int, Any]] = []

    class Repeated(Two):
        def losses(self, batches: Any, run: Any) -> dict[str, Term]:
            reps.append((run.rep, batches["data"].index.tolist()))
            return super().losses(batches, run)

    run = trainer(Repeated(times=3), CNN(), None, images(), steps=2)
    run.fit()
    assert [rep for rep, _ in reps] == [0, 1, 2] * 2
    assert reps[0][1] == reps[1][1] == reps[2][1] != reps[3][1]
    assert run.updates == 2


def test_groups_keep_their_own_learning_rate_under_the_schedule():
    class Groups(Two):
        def stage(self, i: int, run: Any) -> Stage:
            body, head = run["target"].layer1.parameters(), run["target"].fc.parameters()
            groups = [{"params": body, "lr": 1.0}, {"params": head}]
            return Stage({"data": run.data["data"]}, [Phase("student", self.losses, groups)])

    rates: list[list[float]] = []

    def note(run: Any, record: Any) -> None:
        rates.append([g["lr"] for g in run._optimizers["student"].param_groups])

    trainer(Groups(), CNN(), None, images(), steps=4, lr=0.1, schedule=Linear(1.0, 0.0), listener=note).fit()
    assert rates == [pytest.approx([f, 0.1 * f]) for f in (1.0, 0.75, 0.5, 0.25)]


# Averages, validation, precision


def test_the_average_is_returned_and_is_that_of_the_weights():
    weights: list[Tensor] = []

    def note(run: Any, record: Any) -> None:
        weights.append(run.run["target"].fc.weight.detach().clone())

    student = trainer(Labels(), CNN(), None, images(), ema=0.8, listener=note, lr=1.0).fit()
    expected = weights[0]
    for w in weights[1:]:
        expected = 0.8 * expected + 0.2 * w
    assert torch.allclose(student.fc.weight, expected, atol=1e-6)


class Keeping(Labels):
    def __init__(self, keep: str):
        super().__init__()
        self.keep = keep

    def stage(self, i: int, run: Any) -> Stage:
        stage = super().stage(i, run)
        stage.keep = self.keep
        return stage


def test_keep_best_returns_the_best_validated_state():
    states: list[str] = []
    scores = iter([1.0, 5.0, 2.0, 5.0])

    def validate(model: nn.Module) -> float:
        states.append(digest(model))
        return next(scores)

    run = trainer(Keeping("best"), CNN(), None, images(), validate=validate, validate_every=1, steps=4)
    assert digest(run.fit()) == states[1]
    assert [r["validate"] for r in run.history] == [1.0, 5.0, 2.0, 5.0]


def test_the_state_before_a_stage_may_be_the_best():
    student, scores = CNN(), iter([4.0, 1.0, 3.0])
    before = digest(student)
    run = trainer(
        Keeping("best or start"), student, None, images(), validate=lambda _: next(scores), validate_every=1, steps=2
    )
    assert digest(run.fit()) == before
    assert [r["validate"] for r in run.history] == [1.0, 3.0]


def test_validation_may_change_modes_and_draw_random_numbers():
    def validate(model: nn.Module) -> np.floating:
        model.eval()
        torch.rand(7)
        return np.float32(0.5)

    student, _ = pair()
    with_it = trainer(Labels(), student, None, images(), validate=validate, validate_every=1).fit()
    assert digest(with_it) == digest(trainer(Labels(), pair()[0], None, images()).fit())


def test_an_update_that_overflows_first_thing_leaves_no_trace_in_the_momentum():
    p = nn.Parameter(torch.ones(1000))
    optimizer = Training(steps=1, optimizer="sgd", lr=0.1, weight_decay=0.0, precision="fp16").make_optimizer(
        [{"params": [p]}]
    )
    scaler = torch.amp.GradScaler("cpu")
    junk = [torch.full((1000,), 1e30) for _ in range(50)]  # what memory that is not set may hold
    junk.clear()
    for factor in (torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert torch.allclose(p.detach(), torch.full((1000,), 0.9))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("cls", METHODS, ids=lambda c: c.__name__)
def test_losses_are_float32_in_every_precision(cls, precision):
    seen: list[torch.dtype] = []

    class Looking(cls):
        def loss(self, *arguments: Any) -> dict[str, Term]:
            terms = super().loss(*arguments)
            seen.extend(term.sum.dtype for term in terms.values())
            seen.extend(f.dtype for f in arguments[0].features.values())
            return terms

    trainer(make(Looking), *pair(), images(), precision=precision).fit()
    assert set(seen) == {torch.float32}


def test_the_curve_holds_raw_and_weighted_values_and_gradient_norms():
    run = trainer(0.5 * Labels() + KD(alpha=1.0), *pair(), images(), steps=3)
    run.fit()
    assert [r["step"] for r in run.history] == [1, 2, 3]
    first = run.history[0]["terms"]
    assert first["labels"]["weighted"] == pytest.approx(0.5 * first["labels"]["raw"])
    assert first["labels"]["gradient_norm"] > 0
    assert run.history[0]["loss"] == pytest.approx(sum(t["weighted"] for t in first.values()))


def test_a_shuffled_teacher_gives_every_sample_the_outputs_of_another():
    student, teacher = pair()
    run = trainer(KD(), student, teacher, images(), shuffled=True).run
    run.install({"source": ["penultimate"]})
    run.set_modes(set())
    one = batch()
    shuffled = run("source", one)
    run.shuffled = False
    honest = run("source", one)
    order = [(honest.logits == row).all(1).nonzero().item() for row in shuffled.logits]
    assert sorted(order) == list(range(12))
    assert all(i != j for i, j in enumerate(order))
    assert torch.equal(shuffled.features["penultimate"], honest.features["penultimate"][order])
    run.remove_taps()


def test_probing_leaves_no_trace():
    student = CNN(norm=True, dropout=0.5)
    run = trainer(Labels(), student, None, images()).run
    student.train()
    before, state = digest(student), torch.get_rng_state()
    with run.probe():
        student(batch().inputs).sum().backward()
        student.eval()
    assert digest(student) == before
    assert student.training
    assert student.norm.training
    assert all(p.grad is None for p in student.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_bag_becomes_what_was_saved():
    saved, other = Bag(), nn.ModuleDict({"bag": Bag()})
    saved["bank"], saved["weight"] = torch.arange(6.0), nn.Parameter(torch.ones(2, 3))
    other["bag"]["old"], other["bag"]["bank"] = torch.zeros(1), torch.zeros(2)
    other.load_state_dict(nn.ModuleDict({"bag": saved}).state_dict())
    bag = other["bag"]
    assert "old" not in bag
    assert torch.equal(bag["bank"], torch.arange(6.0))
    assert [n for n, _ in bag.named_parameters()] == ["weight"]
    del bag["weight"]
    bag["bank"] = nn.Parameter(torch.zeros(1))
    assert [n for n, _ in bag.named_parameters()] == ["bank"]
    with pytest.raises(KeyError):
        bag["old"]


def test_a_language_model_is_distilled_on_unlabelled_text():
    student, teacher = language_model(1), language_model(2)
    values: list[float] = []
    trainer(
        KD(alpha=1.0, temperature=1.0) + RKD(distance=0.0),
        student,
        teacher,
        torch.randint(11, (24, 8)),
        task="language-model",
        steps=60,
        optimizer="adam",
        lr=0.02,
        listener=lambda run, record: values.append(record["terms"]["kd"]["raw"]),
    ).fit()
    assert values[-1] < 0.5 * values[0]


def test_a_loaders_last_short_batch_is_trained_on():
    sizes: list[int] = []

    class Sizes(Labels):
        def losses(self, batches: Any, run: Any) -> Any:
            sizes.append(batches["data"].size)
            return super().losses(batches, run)

    x, y = images(8)
    trainer(Sizes(), CNN(), None, Iterated([(x[:5], y[:5]), (x[5:], y[5:])]), epochs=2).fit()
    assert sizes == [5, 3, 5, 3]


# Optimisers that forget


class Forgetful(KD):
    """Resets its optimiser before every third update."""

    def begin_epoch(self, run: Any) -> None:
        if run.clock.step % 3 == 0:
            run.reset_optim("student")


def forgetful(folder: Any = None, listener: Any = None) -> Any:
    settings = {"steps": 7, "batch_size": 12, "optimizer": "adam", "folder": folder, "listener": listener}
    return trainer(Forgetful(), CNN(seed=1), CNN(width=6), images(), **settings)


def test_an_optimiser_that_was_reset_starts_from_nothing():
    counts = []
    forgetful(listener=lambda run, record: counts.append(count(run.run.optimizers["student"]))).fit()
    assert counts == [1, 2, 3, 1, 2, 3, 1]


def count(optimizer: Any) -> int:
    return int(next(iter(optimizer.state.values()))["step"])


@pytest.mark.parametrize("update", [2, 3, 4])
def test_a_reset_optimiser_resumes_bit_equal(update, tmp_path):
    def kill(run: Any, record: Any) -> None:
        if run.updates == update:
            raise KeyboardInterrupt

    expected = digest(forgetful().fit())
    with pytest.raises(KeyboardInterrupt):
        forgetful(tmp_path, kill).fit()
    assert digest(forgetful(tmp_path).fit(resume=True)) == expected


def test_only_a_phase_of_the_stage_can_be_reset():
    class Wrong(KD):
        def begin_epoch(self, run: Any) -> None:
            run.reset_optim("studnet")

    with pytest.raises(MethodError, match="no phase 'studnet' to reset: did you mean 'student'"):
        trainer(Wrong(), CNN(), CNN(), images()).fit()

"""ORC: who is promoted, what the pivot gets back, and which networks each sub-step moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import CNN, digest, images
from processes import on_ranks
from pydantic import TypeAdapter
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, VocabularyError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Phase
from transfuse.core.run import Run
from transfuse.core.streams import as_data
from transfuse.core.sync import sync_for
from transfuse.core.trainer import Trainer
from transfuse.core.training import Training
from transfuse.distill import KD, ORC
from transfuse.distill.orc import apportion
from transfuse.losses import cross_entropy, kl_divergence
from transfuse.report.panels import Lines, Panel

STUDENTS = ["source.1", "source.2", "target"]


def labelled(count: int = 12) -> tuple[Tensor, Tensor]:
    inputs, labels = images(count)
    return inputs, labels.where(labels != -100, torch.arange(count) % 3)


def group(**options: Any) -> dict[str, nn.Module]:
    return {role: CNN(width=8 - i, seed=i, **options) for i, role in enumerate(["source.0", *STUDENTS])}


def trainer(method: ORC, roles: dict[str, nn.Module], data: Any = None, **options: Any) -> Trainer:
    run = {k: options.pop(k) for k in ("folder", "listener", "shuffled", "sync") if k in options}
    settings = {"steps": 6, "batch_size": 6, "optimizer": "sgd", "lr": 0.1, "checkpoint_every": 0.0} | options
    return Trainer(method, roles, {"data": as_data(labelled() if data is None else data)}, Training(**settings), **run)


class Watched(ORC):
    """Notes which roles have moved after each phase of an update, and who was promoted."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._moved: list[tuple[str, set[str]]] = []
        self._who: list[list[str]] = []
        self._digests: dict[str, str] = {}

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        if phase.name == "group":
            self._who.append(self._decided(run).promoted)
        super().after_update(phase, values, run)
        now = {role: digest(run[role]) for role in run.roles}
        self._moved.append((phase.name, {role for role in now if now[role] != self._digests[role]}))
        self._digests = now

    def begin_epoch(self, run: Run) -> None:
        super().begin_epoch(run)
        self._digests = {role: digest(run[role]) for role in run.roles}


# Who moves when


@pytest.mark.parametrize("promoted", [1, 2])
def test_each_sub_step_moves_its_own_networks_only(promoted):
    method = Watched(promoted=promoted)
    trainer(method, group(), epochs=2, steps=None).fit()
    for update, who in enumerate(method._who):
        steps = dict(method._moved[3 * update : 3 * update + 3])
        assert list(steps) == ["intensive", "private", "group"]
        assert steps["intensive"] == {"source.0"}
        assert steps["private"] == set(who)
        assert steps["group"] == set(STUDENTS) - set(who)
        assert len(who) == promoted


def test_a_promoted_network_teaches_with_the_weights_that_it_has_after_private_teaching():
    seen: list[tuple[str, bool, str]] = []

    class Spy(ORC):
        def _teach(self, roles: Any, promoted: Any, batch: Batch, run: Run) -> Any:
            seen.extend((run.phase.name, role in promoted, digest(run[role])) for role in STUDENTS)
            return super()._teach(roles, promoted, batch, run)

    trainer(Spy(), group(), steps=1).fit()
    before = {role: d for role, (phase, _, d) in zip(STUDENTS, seen[:3], strict=True)}
    for role, (phase, teaches, now) in zip(STUDENTS, seen[3:], strict=True):
        assert phase == "group"
        assert (now != before[role]) == teaches


def test_students_keep_one_optimiser_whichever_way_they_are_taught():
    run = trainer(ORC(), group(), epochs=8, steps=None, optimizer="adam", lr=0.01)
    run.fit()
    assert set(run.run.optimizers) == {"intensive", "students"}
    states = run.run.optimizers["students"].state
    assert {int(s["step"]) for s in states.values()} == {run.updates}  # each was stepped once in every update


def test_every_student_runs_once_with_and_once_without_a_graph_and_teachers_once_more():
    roles = group()
    method = Watched()
    trainer(method, roles, epochs=2, steps=None).fit()
    teaching = Counter(role for who in method._who for role in who)
    for role in STUDENTS:
        trained = sum(roles[role].calls)
        assert trained == 2 * len(method._who) + teaching[role]
    assert sum(roles["source.0"].calls) == 2 * len(method._who)  # mixed samples; and the batch, for both teachings


# Promotion


class Says(nn.Module):
    """Gives the logits that it was made with to every sample, plus a parameter that is zero."""

    def __init__(self, logits: list[float]):
        super().__init__()
        self.logits, self.zero = torch.tensor(logits), nn.Parameter(torch.zeros(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.logits + self.zero).expand(len(inputs), 3)


def told(right: list[float]) -> dict[str, nn.Module]:
    return {role: Says([x, 0.0, 0.0]) for role, x in zip(["source.0", *STUDENTS], [9.0, *right], strict=True)}


def zeros(count: int = 6) -> tuple[Tensor, Tensor]:
    return labelled(count)[0], torch.zeros(count, dtype=torch.long)


@pytest.mark.parametrize(("right", "who"), [([1.0, 3.0, 2.0], 1), ([1.0, 2.0, 3.0], 2), ([3.0, 3.0, 1.0], 0)])
def test_the_student_with_the_least_loss_is_promoted_and_ties_go_to_the_first(right, who):
    method = ORC(feedback=False)
    trainer(method, told(right), zeros(), steps=1).fit()
    assert method.promotions.tolist() == [[int(k == who) for k in range(3)]]


def test_ranking_by_accuracy_does_not_look_at_the_loss():
    method = ORC(rank="accuracy", feedback=False)
    trainer(method, told([1.0, 3.0, 2.0]), zeros(), steps=1).fit()
    assert method.promotions.tolist() == [[1, 0, 0]]  # all are always right


def test_a_moving_average_ranks_by_what_was_before_too():
    method = ORC(momentum=0.9, promoted=1)
    roles = group()
    trainer(method, roles, steps=5).fit()
    scores = method.table["ranking"]
    assert scores.isfinite().all()
    method, now = ORC(momentum=0.0), None
    trainer(method, group(), steps=5).fit()
    now = method.table["ranking"]
    assert (scores > now).all()  # losses fall, so an average lies above the last


def test_the_table_of_roles_has_a_row_per_epoch_and_k_promotions_per_update():
    method = ORC(promoted=2)
    run = trainer(method, group(), epochs=3, steps=None)
    run.fit()
    assert method.promotions.shape == (3, 3)
    assert method.promotions.sum(1).tolist() == [4, 4, 4]
    (panel,) = method.panels()
    assert isinstance(TypeAdapter(Panel).validate_python(panel), Lines)
    assert list(panel["series"]) == STUDENTS
    for epoch in range(3):
        assert sum(series[epoch][1] for series in panel["series"].values()) == pytest.approx(2)
    assert method._decision is None
    assert not method._seen.wrong


def test_nobody_is_promoted_from_outside_the_students_nor_as_many_as_there_are():
    with pytest.raises(InputError, match="promoted is 3, it must be below the number of students, 3"):
        trainer(ORC(promoted=3), group()).fit()
    pair = {role: model for role, model in group().items() if role in ("source.0", "target")}
    with pytest.raises(InputError, match=r"pass source=\[pivot, student"):
        trainer(ORC(), {"source": pair["source.0"], "target": pair["target"]}).fit()


# Feedback


def wrong(*rows: list[int], size: int = 8) -> Tensor:
    table = torch.zeros(len(rows), size, dtype=torch.bool)
    for k, errors in enumerate(rows):
        table[k, errors] = True
    return table


def test_feedback_lies_in_the_errors_and_is_as_large_as_the_batch():
    table = wrong([0, 1, 2], [2], [5])
    chosen = ORC().draw(table, torch.tensor([0.5, 0.1, 0.1]))
    assert len(chosen) == 8
    assert set(chosen.tolist()) <= {0, 1, 2, 5}


def test_a_students_share_is_the_softmax_of_how_badly_it_did():
    performance = torch.tensor([0.0, 2.0])
    chosen = ORC().draw(wrong([0, 1, 2, 3], [4, 5, 6, 7]), performance)
    assert int((chosen > 3).sum()) == round(8 * performance.softmax(0)[1].item())


def test_a_student_without_errors_has_no_share():
    chosen = ORC().draw(wrong([], [3, 4]), torch.tensor([9.0, 0.0]))
    assert len(chosen) == 8
    assert set(chosen.tolist()) == {3, 4}


def test_without_errors_there_is_no_feedback():
    assert ORC().draw(wrong([], []), torch.zeros(2)).tolist() == []


def test_errors_are_drawn_once_each_where_they_suffice():
    chosen = ORC().draw(wrong([1, 2, 3, 4, 5, 6, 7, 0]), torch.zeros(1))
    assert sorted(chosen.tolist()) == list(range(8))


@pytest.mark.parametrize("shares", [[0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0], [0.49, 0.49, 0.02]])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_shares_are_rounded_to_sum_to_the_whole(shares, size):
    counts = apportion(torch.tensor(shares), size)
    assert sum(counts) == size
    assert all(abs(count - share * size) < 1 for count, share in zip(counts, shares, strict=True))


def mixed_loss(lam: float, monkeypatch: pytest.MonkeyPatch, feedback: Tensor | None = None) -> tuple[float, Tensor]:
    """The value of L_I in one update at a given lam, and the pivot's logits on what it saw."""

    class Fixed:
        def __init__(self, *_: float):
            pass

        def sample(self) -> Tensor:
            return torch.tensor(lam)

    monkeypatch.setattr(torch.distributions, "Beta", Fixed)
    method = ORC()
    if feedback is not None:
        monkeypatch.setattr(method, "draw", lambda *_: feedback)
    run = trainer(method, group(), steps=1, batch_size=12, shuffle=False)
    run.fit()
    return run.history[-1]["terms"]["intensive/labels"]["raw"], feedback


def pivot_loss(inputs: Tensor, labels: Tensor) -> float:
    return nn.functional.cross_entropy(group()["source.0"](inputs), labels).item()


def test_mixing_goes_from_the_feedback_to_the_batch(monkeypatch):
    inputs, labels = labelled()
    chosen = torch.tensor([3, 3, 5, 1, 0, 7, 7, 7, 2, 9, 11, 4])
    assert mixed_loss(1.0, monkeypatch, chosen)[0] == pytest.approx(pivot_loss(inputs, labels), rel=1e-5)
    assert mixed_loss(0.0, monkeypatch, chosen)[0] == pytest.approx(
        pivot_loss(inputs[chosen], labels[chosen]), rel=1e-5
    )
    mixed = 0.3 * inputs + 0.7 * inputs[chosen]
    expected = 0.3 * pivot_loss(mixed, labels) + 0.7 * pivot_loss(mixed, labels[chosen])
    assert mixed_loss(0.3, monkeypatch, chosen)[0] == pytest.approx(expected, rel=1e-5)


def test_where_nobody_erred_the_pivot_learns_the_batch_as_it_is(monkeypatch):
    none = torch.empty(0, dtype=torch.long)
    assert mixed_loss(0.3, monkeypatch, none)[0] == pytest.approx(pivot_loss(*labelled()), rel=1e-5)


# Losses


def outputs_of(*roles: str) -> tuple[dict[str, Outputs], Batch]:
    inputs, labels = labelled()
    models = group()
    return {role: Outputs(models[role](inputs)) for role in roles}, Batch(inputs=inputs, labels=labels)


def test_two_teachers_pull_twice_as_a_sum_and_once_as_a_mean():
    found, batch = outputs_of("source.0", "target")
    networks = {"target": found["target"], "source.0": found["source.0"], "source.1": found["source.0"]}
    one = kl_divergence(found["target"].logits, found["source.0"].logits, temperature=4.0).mean().item()
    for reduction, factor in (("sum", 2), ("mean", 1)):
        terms = ORC(reduction=reduction).loss("target", networks, batch, Clock())
        assert terms["kd"].mean.item() == pytest.approx(factor * one)


def test_beta_weighs_labels_against_teachers():
    found, batch = outputs_of("source.0", "target")
    terms = ORC(beta=0.0).loss("target", found, batch, Clock())
    assert terms["kd"].weight == 0.0
    assert terms["labels"].weight == 1.0
    assert terms["labels"].mean.item() == pytest.approx(
        cross_entropy(found["target"].logits, batch.labels).mean().item()
    )
    terms = ORC(beta=0.3).loss("target", found, batch, Clock())
    assert (terms["labels"].weight, terms["kd"].weight) == (0.7, 0.3)


def test_without_promotion_and_feedback_it_is_kd_from_the_pivot():
    roles = group(norm=True)
    pivot = digest(roles["source.0"])
    trainer(ORC(temperature=4.0, beta=0.5, promoted=0, feedback=False), roles, steps=8).fit()
    student = group(norm=True)["target"]
    teacher = group(norm=True)["source.0"]
    settings = Training(steps=8, batch_size=6, optimizer="sgd", lr=0.1)
    Trainer(KD(4.0, 0.5), {"source": teacher, "target": student}, {"data": as_data(labelled())}, settings).fit()
    for (name, ours), theirs in zip(roles["target"].state_dict().items(), student.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name
    assert digest(roles["source.0"]) == pivot


# Resume and processes


class Killed(BaseException):
    pass


def kill_at(update: int) -> Callable[..., None]:
    def listener(run: Trainer, record: Any) -> None:
        if run.updates == update:
            raise Killed

    return listener


@pytest.mark.parametrize("update", [1, 5, 7])
def test_every_network_and_the_table_of_roles_are_resumed_bit_equal(update, tmp_path):
    def run(**options: Any) -> tuple[Trainer, dict[str, nn.Module]]:
        roles = group(norm=True, dropout=0.3)
        method = ORC(momentum=0.5)
        return trainer(method, roles, epochs=4, steps=None, optimizer="adamw", clip=0.5, **options), roles

    whole, expected = run()
    whole.fit()
    with pytest.raises(Killed):
        run(folder=tmp_path, listener=kill_at(update))[0].fit()
    torch.manual_seed(99)
    resumed, roles = run(folder=tmp_path)
    resumed.fit(resume=True)
    assert {r: digest(m) for r, m in roles.items()} == {r: digest(m) for r, m in expected.items()}
    assert digest(resumed.method) == digest(whole.method)
    assert torch.equal(resumed.method.promotions, whole.method.promotions)
    assert resumed.history == whole.history


def test_no_network_is_said_to_be_untaught_though_only_some_are_promoted():
    run = trainer(ORC(), group(), steps=12)
    run.fit()
    assert not [message for finding, message in run.watch.messages.items() if finding.startswith("untaught")]


def work(folder: Any, rank: int) -> None:
    import pickle

    roles = group()
    method = ORC(feedback=False)  # feedback is drawn within each process's share
    trainer(method, roles, steps=4, batch_size=12, sync=sync_for("cpu")).fit()
    found = (
        {role: digest(model) for role, model in roles.items()},
        method.promotions,
        roles["target"].fc.weight.detach(),
    )
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(found))


def test_two_processes_promote_the_same_network_as_one(tmp_path):
    (digests, table, weight), other = on_ranks(work, tmp_path)
    assert digests == other[0]
    assert torch.equal(table, other[1])
    roles, method = group(), ORC(feedback=False)
    trainer(method, roles, steps=4, batch_size=12).fit()
    assert torch.equal(method.promotions, table)
    assert torch.allclose(roles["target"].fc.weight, weight, atol=1e-6)


# Errors


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},
        {"beta": 1.5},
        {"promoted": -1},
        {"rank": "size"},
        {"momentum": 1.0},
        {"shares": "size"},
        {"mixing": 0.0},
        {"reduction": "max"},
    ],
)
def test_refuses_settings_out_of_range(wrong):
    with pytest.raises(InputError, match=f"ORC: {next(iter(wrong))} is"):
        ORC(**wrong)


def test_refuses_a_group_that_does_not_fit():
    roles = group()
    roles["source.2"].fc = nn.Linear(roles["source.2"].fc.in_features, 5)
    with pytest.raises(VocabularyError):
        trainer(ORC(), roles).fit()
    roles = group()
    roles["source.2"] = roles["source.1"]
    with pytest.raises(InputError, match="share parameters"):
        trainer(ORC(), roles).fit()


def test_inputs_that_cannot_be_mixed_are_refused_unless_there_is_no_feedback():
    class Embeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.table(tokens).mean(1)

    def run(method: ORC) -> Trainer:
        data = torch.arange(24).view(8, 3) % 5, torch.arange(8) % 3
        return trainer(method, {role: Embeds() for role in ["source.0", *STUDENTS]}, data, steps=1)

    with pytest.raises(InputError, match="inputs that are one tensor of floats"):
        run(ORC()).fit()
    run(ORC(feedback=False)).fit()

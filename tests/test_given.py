"""What a family may be handed: several sources, data as source, named sets, no data; and what reports make of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import CNN, digest, images
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from transfuse import Transfer, transfer
from transfuse.adapt import DANN, SourceOnly
from transfuse.continual import FineTune
from transfuse.core.errors import InputError, MethodError
from transfuse.core.method import Method
from transfuse.core.phases import Phase, Stage
from transfuse.core.streams import Draw, as_data
from transfuse.cotrain import StaticMixture
from transfuse.distill import DML, KD, Labels
from transfuse.evaluation import Evaluation, evaluate
from transfuse.given import HeldOut, read_held_out, read_sources, read_streams
from transfuse.measure import AdversarialTransferability
from transfuse.synthesize import CAEDFKD

SHORT = {"steps": 3, "batch_size": 6}


def labelled(count: int = 12, seed: int = 0) -> TensorDataset:
    inputs, _ = images(count, seed)
    return TensorDataset(inputs, torch.arange(count) % 3)


def adaptation(**options) -> Transfer:
    settings = {"test": labelled(9, 2), **SHORT, **options}
    return Transfer(DANN(hidden=4), labelled(), CNN(), images(12, 1)[0], **settings)


# Reading


def test_streams_are_named_by_what_they_are_given_as():
    one, other = labelled(), labelled(9)
    assert list(read_streams(one, None, None)) == ["data"]
    assert list(read_streams({"a": one, "b": other}, None, None)) == ["a", "b"]
    assert list(read_streams([one, other], None, None)) == ["0", "1"]
    assert read_streams(None, None, None) == {}
    # Tensors, and a list of batches, are one data set as before.
    assert list(read_streams({"inputs": one.tensors[0]}, None, None)) == ["data"]
    assert list(read_streams([one.tensors, other.tensors], None, None)) == ["data"]


def test_what_cannot_be_read_is_named():
    with pytest.raises(InputError, match="data 'b': .*NoneType"):
        read_streams({"a": labelled(), "b": None}, None, None)
    with pytest.raises(InputError, match="test: the data set is empty"):
        read_held_out("test", [], None, None)


def test_sources_are_roles():
    one, other = CNN(), CNN(seed=1)
    assert list(read_sources(one)) == ["source"]
    assert list(read_sources([one, other])) == ["source.0", "source.1"]
    assert list(read_sources({"big": one})) == ["source.big"]
    assert read_sources(None) == {}
    with pytest.raises(InputError, match="stands twice"):
        read_sources([one, one])
    with pytest.raises(InputError, match="empty list"):
        read_sources([])


def test_held_out_sets_say_which_set_a_batch_is_from():
    sets = HeldOut({"old": as_data(labelled(5)), "new": as_data(labelled(7))})
    batches = [batch for micro in sets.epoch(Draw(4, None, False, 0), 0) for batch in micro]
    assert torch.cat([b.task for b in batches]).tolist() == [0] * 5 + [1] * 7
    assert (sets.size, sets.updates(4)) == (12, 4)
    assert all(b.labels is None for micro in sets.without_labels().epoch(Draw(4, None, False, 0), 0) for b in micro)


# Scoring


class TaskAware(nn.Module):
    """Always says the class of the task it is told."""

    def forward(self, inputs: Tensor, task: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.full((len(inputs),), task), 3).float()


def test_a_model_with_a_parameter_task_is_told_it():
    sets = read_held_out("test", {"zero": labelled(6), "one": labelled(9)}, None, None)
    found = evaluate(TaskAware(), sets, task="classification", batch_size=4)
    assert found.by_set("accuracy") == {"zero": pytest.approx(1 / 3), "one": pytest.approx(1 / 3)}
    assert len(found.values["accuracy"]) == 15


def test_pooled_and_by_set_agree_also_where_samples_differ_in_length():
    values = torch.tensor([6.0, 2.0, 1.0])  # sums per sample
    counts = torch.tensor([3.0, 1.0, 2.0])
    scale = len(counts) / counts.sum()
    found = Evaluation({"nll": values * scale}, sets=("a", "b"), of_set=torch.tensor([0, 0, 1]), counts=counts)
    assert found.metrics["nll"] == pytest.approx(9 / 6)
    assert found.by_set("nll") == {"a": pytest.approx(8 / 4), "b": pytest.approx(1 / 2)}


# The one call


def test_data_may_be_the_source_and_every_set_is_in_the_report():
    report = (
        adaptation(test={"target": labelled(9, 2), "source": labelled()}, compare=[SourceOnly(), "shuffled source"])
        .run()
        .report
    )
    assert [arm.role for arm in report.arms] == ["method", "baseline", "control"]
    assert report.source.name == "labelled data"
    assert set(report.method_arm.runs[0].sets) == {"target", "source"}
    titles = [panel.title for panel in report.panels]
    assert titles == ["accuracy on each held-out set", "domains before", "domains after"]
    assert {name: len(points) for name, points in report.panels[1].series.items()} == {"source": 12, "target": 9}


def test_labels_of_the_target_domain_choose_nothing():
    runs = []
    for labels in (torch.arange(12) % 3, torch.randint(3, (12,))):
        inputs = images(12, 3)[0]
        transfer_ = adaptation(validate=TensorDataset(inputs, labels), validate_every=1)
        runs.append(digest(transfer_.run().model))
    assert runs[0] == runs[1]


def test_the_oracle_is_marked():
    report = adaptation(validate=labelled(12, 3), select="oracle").run().report
    assert any("an oracle, not a result" in warning for warning in report.warnings)
    with pytest.raises(InputError, match="unknown validator 'mutual'.*mutual_information"):
        adaptation(select="mutual")


def test_a_shuffled_source_keeps_its_samples_and_its_labels_in_other_places():
    data = as_data(labelled(30))
    shuffled = data.shuffled_labels(0)
    plain, other = data.fetch(torch.arange(30)), shuffled.fetch(torch.arange(30))
    assert torch.equal(plain.inputs, other.inputs)
    assert torch.equal(plain.labels.sort().values, other.labels.sort().values)
    assert not torch.equal(plain.labels, other.labels)


def test_sources_that_learn_are_copies():
    big = CNN(width=6, seed=1)
    before = digest(big)
    transfer(DML(), source=big, target=CNN(), data=labelled(), **SHORT)
    assert digest(big) == before


def test_no_data_is_enough_for_a_method_that_makes_its_own():
    teacher = CNN(width=6, norm=True)
    with pytest.raises(InputError, match="needs data: pass data"):
        Transfer(KD(), teacher, CNN(), None, **SHORT)
    method = CAEDFKD(shape=[1, 4, 4], width=4, latent=4, generator_steps=1, student_steps=1)
    with pytest.raises(InputError, match="'scratch' needs data"):
        Transfer(method, teacher, CNN(), None, test=labelled(), compare=["scratch"], **SHORT)


def test_what_is_missing_is_said_before_training():
    with pytest.raises(InputError, match=r"pass it as source=\.\.\."):
        Transfer(DANN(), None, CNN(), images()[0], **SHORT)
    with pytest.raises(InputError, match="no source data whose labels"):
        Transfer(KD(), CNN(seed=1), CNN(), labelled(), compare=["shuffled source"], test=labelled(), **SHORT)
    pools = {"a": labelled(), "b": labelled()}
    mixed = Transfer(StaticMixture({"a": 1.0}), None, CNN(), pools, test=labelled(), compare=["scratch"], **SHORT)
    with pytest.raises(InputError, match="learn from one data set, these are several"):
        mixed.run()


def test_stages_are_scored_on_every_set_and_survive_a_resume(tmp_path):
    tasks = [
        TensorDataset(images(12)[0], torch.arange(12) % 2),
        TensorDataset(images(12, 1)[0], 1 + torch.arange(12) % 2),
    ]

    def build() -> Transfer:
        return Transfer(FineTune(), target=CNN(), data=tasks, test=tasks, out=tmp_path / "run", **SHORT)

    report = build().run().report
    stages = report.method_arm.runs[0].stages
    assert [list(stage) for stage in stages] == [["0", "1"], ["0", "1"]]
    assert stages[-1] == report.method_arm.runs[0].sets
    kinds = {panel.title.split(":")[0]: panel.kind for panel in report.panels}
    assert kinds["accuracy after each stage"] == "matrix"
    assert kinds["accuracy from stage to stage"] == "lines"
    again = build().run(resume=True)
    assert again.report.method_arm.runs[0].stages == stages
    assert again.model(images(3)[0], task=1).shape == (3, 3)


class Alone(Method):
    """A method that cannot be divided."""

    one_process = "it counts to a number that only one process can know"

    def stage(self, i, run):
        return Stage({"data": run.data["data"]}, [Phase("p", lambda b, r: {}, run["target"].parameters())])


def test_a_method_that_cannot_be_divided_refuses_several_processes_with_its_reason():
    from helpers import trainer

    from transfuse.core.sync import Sync

    several = Sync()
    several.world = 2
    with pytest.raises(MethodError, match="cannot run on 2 processes: it counts"):
        trainer(Alone(), CNN(), None, labelled(), sync=several)


# Measures


def test_a_measure_stands_in_the_place_of_a_method_and_changes_nothing(tmp_path: Path):
    one, other = CNN(seed=1), CNN()
    before = digest(one), digest(other)
    found = transfer(
        AdversarialTransferability(steps=2, low=-4, high=4), source=one, target=other, data=images(12)[0], out=tmp_path
    )
    assert (digest(one), digest(other)) == before
    assert found.report.verdict == "not compared"
    assert found.report.method_arm.runs[0].metrics == pytest.approx(dict(found.measurement.numbers))
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html"}


def test_a_control_method_is_a_baseline_of_any_comparison():
    transfer_ = Transfer(KD(), CNN(seed=1), CNN(), labelled(), test=labelled(9), compare=[Labels(), KD(2.0)], **SHORT)
    assert [arm.role for arm in transfer_.arms] == ["method", "baseline", "method (compared)"]

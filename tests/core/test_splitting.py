"""An update gives one gradient, however it is cut into micro-batches and shared among processes."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import (
    CNN,
    METHODS,
    assert_equal_gradients,
    declared,
    digest,
    first_gradients,
    images,
    language_model,
    make,
    ragged_tokens,
    trainer,
)
from processes import on_ranks
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.errors import MethodError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Phase, Stage
from transfuse.core.sync import sync_for
from transfuse.distill import KD, RKD, Distillation, Hints, WCoRD
from transfuse.losses import Term, kl_divergence


class Mixed(Distillation):
    """Every kind of unit at once: tokens, samples, an own one, and one that only the forward pass knows."""

    units: ClassVar = {"third token": lambda batch: batch.mask[:, 2].sum()}

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> dict[str, Term]:
        tokens = kl_divergence(student.logits, teacher.logits)
        last = student.logits[:, 0].square().mean(-1)
        unsure = (teacher.logits.softmax(-1).amax(-1) < 0.5) & batch.mask
        return {
            "tokens": Term.of(tokens, batch.mask),
            "samples": 0.3 * Term.of(last),
            "third": 2.0 * Term.of(tokens[:, 2], batch.mask[:, 2], "third token"),
            "unsure": 0.7 * Term.of(tokens, unsure, "late:unsure"),
        }


class Combined(Mixed):
    """The gradients of two terms on the shared parameters, brought to one length and added."""

    def loss(self, *arguments: Any) -> dict[str, Term]:
        terms = super().loss(*arguments)
        return {"tokens": terms["tokens"], "samples": terms["samples"]}

    def combine(self, rows: dict[str, list[Tensor]], run: Any) -> list[Tensor]:
        lengths = {name: torch.cat([g.flatten() for g in row]).norm() for name, row in rows.items()}
        return [sum(row[i] / lengths[name] for name, row in rows.items()) for i in range(len(rows["tokens"]))]

    def stage(self, i: int, run: Any) -> Stage:
        shared = list(run["target"].blocks.parameters())
        phase = Phase("student", self.losses, run["target"].parameters(), combine=self.combine, shared=shared)
        return Stage({"data": run.data["data"]}, [phase])


Case = tuple[Distillation, nn.Module, nn.Module, Any, str]
"""Method, student, teacher, data, task."""


def token_case(method: Distillation) -> Case:
    return method, language_model(0), language_model(1, dim=12), ragged_tokens(), "language-model"


def case_of(cls: type[Distillation]) -> Case:
    if "language-model" in cls.card.tasks:
        return token_case(make(cls, "blocks.0"))
    return make(cls), CNN(seed=0), CNN(width=6, seed=1), images(), "classification"


COUPLED = {RKD, WCoRD, *declared("COUPLED")}  # couple the samples of a micro-batch, and say so
SAMPLE_WISE = [cls for cls in METHODS if cls not in COUPLED]
CASES: dict[str, Callable[[], Case]] = {
    **{cls.__name__: lambda cls=cls: case_of(cls) for cls in SAMPLE_WISE},
    "every unit": lambda: token_case(Mixed()),
    "combine": lambda: token_case(Combined()),
    "sum": lambda: token_case(KD() + 0.5 * Hints("blocks.0", "blocks.0") + Mixed()),
    "images": lambda: (KD(alpha=0.5), CNN(), CNN(width=6, seed=1), images(), "classification"),
}


def gradients(case: str, **settings: Any) -> dict[str, Tensor]:
    method, student, teacher, data, task = CASES[case]()
    return first_gradients(method, student, teacher, data, task=task, **settings)


@pytest.mark.parametrize("size", [1, 4, 5])
@pytest.mark.parametrize("case", CASES)
def test_micro_batches_change_no_gradient(case, size):
    assert_equal_gradients(gradients(case), gradients(case, micro_batch=size))


@pytest.mark.parametrize("case", ["every unit", "combine"])
def test_extra_padding_changes_no_gradient(case):
    def padded(columns: int) -> dict[str, Tensor]:
        method, student, teacher, data, task = CASES[case]()
        longer = {name: torch.nn.functional.pad(tensor, (0, columns)) for name, tensor in data.items()}
        return first_gradients(method, student, teacher, longer, task=task)

    assert_equal_gradients(padded(0), padded(6))


def work(folder: Path, rank: int) -> None:
    sync = sync_for("cpu")
    assert (sync.rank, sync.world) == (rank, 2)
    found = {(case, size): gradients(case, micro_batch=size, sync=sync) for case in CASES for size in (None, 2)}
    student = CNN(norm=True, seed=rank)  # a launcher's processes need not agree on how they were seeded
    method = KD() + 0.5 * Hints("layer2", "layer2")
    run = trainer(method, student, CNN(width=6), images(), sync=sync, folder=folder / "run", steps=5, clip=1.0)
    run.fit()
    again = CNN(norm=True, seed=5 + rank)
    trainer(
        KD() + 0.5 * Hints("layer2", "layer2"),
        again,
        CNN(width=6),
        images(),
        sync=sync,
        folder=folder / "run",
        steps=5,
        clip=1.0,
    ).fit(resume=True)
    answer = {
        "gradients": found,
        "student": digest(student),
        "resumed": digest(again),
        "method": digest(method),
        "values": run.history[-1]["terms"],
        "files": sorted(p.name for p in run.checkpoints.newest.iterdir()),
    }
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(answer))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_change_no_gradient(case, size, ranks):
    expected = gradients(case)
    for answer in ranks:
        assert_equal_gradients(expected, answer["gradients"][case, size])


def test_processes_end_with_the_same_model_even_from_different_ones(ranks):
    one, other = ranks
    assert one["student"] == other["student"]
    assert one["method"] == other["method"]
    assert one["values"] == other["values"]


def test_every_process_has_its_own_part_of_a_checkpoint(ranks):
    assert ranks[0]["files"] == ["rank0.safetensors", "rank1.safetensors", "shared.safetensors"]
    assert ranks[0]["resumed"] == ranks[1]["resumed"] == ranks[0]["student"]


# What a term must count


class Wrong(KD):
    """A loss whose term is changed by a test."""

    def __init__(self, change: Callable[[Term], Any]):
        super().__init__(alpha=1.0)
        self.change = change

    def loss(self, *arguments: Any) -> dict[str, Any]:
        return {"kd": self.change(super().loss(*arguments)["kd"])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: replace(t, count=t.count - 1), "'kd' counted 5, its unit 'sample' totals 6"),
        (lambda t: replace(t, unit="pixel"), "counts 'pixel', which this batch does not have: it has part, sample"),
        (lambda t: t.sum, "the term 'kd' is a Tensor: return Term"),
        (lambda t: replace(t, sum=t.sum.expand(2)), r"the term 'kd' has shape \(2,\): use Term.of"),
        (lambda t: replace(t, sum=t.sum.detach()), "none of its terms .* depends on a parameter it trains"),
    ],
)
def test_a_term_that_breaks_the_contract_is_refused(change, message):
    with pytest.raises(MethodError, match=message):
        trainer(Wrong(change), CNN(), CNN(width=6), images()).fit()


def test_units_known_late_cannot_be_combined():
    class Late(Combined):
        def loss(self, *arguments: Any) -> dict[str, Term]:
            return Mixed.loss(self, *arguments)

    method, student, teacher, data, task = token_case(Late())
    with pytest.raises(MethodError, match="'unsure' counts 'late:unsure', known only after the forward pass"):
        first_gradients(method, student, teacher, data, task=task)


def test_half_precision_scales_late_terms_like_the_others(monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=64.0)  # the usual one overflows on purpose at first
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    assert_equal_gradients(gradients("every unit"), gradients("every unit", precision="fp16"), tolerance=0.002)


def test_unlabelled_dense_outputs_count_their_positions_late():
    """A segmentation model on images alone: how many positions there are, only the logits know."""
    student, teacher = (nn.Conv2d(1, 3, 3, padding=1) for _ in range(2))

    def found(**settings: Any) -> dict[str, Tensor]:
        target = copy.deepcopy(student)
        return first_gradients(KD(alpha=1.0), target, teacher, images()[0], task="segmentation", **settings)

    assert_equal_gradients(found(), found(micro_batch=5))


def test_relations_are_the_mean_over_micro_batches():
    """The batch-coupled exception: RKD's gradient is that of its mean over the micro-batches."""

    def parts() -> dict[str, Tensor]:
        found = []
        x, y = images()
        for start in (0, 4, 8):
            chunk = (x[start : start + 4], y[start : start + 4])
            found.append(first_gradients(RKD(), CNN(), CNN(width=6, seed=1), chunk, batch_size=4))
        return {name: sum(f[name] for f in found) / 3 for name in found[0]}

    assert_equal_gradients(parts(), first_gradients(RKD(), CNN(), CNN(width=6, seed=1), images(), micro_batch=4))

"""What a run tells its user: terms that teach nothing, and numbers that are not finite."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CNN, images, trainer
from torch import nn

from transfuse.core.checkpoint import Checkpoints
from transfuse.core.checks import fingerprint
from transfuse.core.clock import Clock, Linear
from transfuse.core.errors import DivergenceError
from transfuse.core.outputs import Outputs
from transfuse.core.watch import TransferWarning
from transfuse.distill import KD, Distillation, Hints, Labels
from transfuse.losses import Term


class Scaled(Distillation):
    """Cross-entropy-like and a second term, `scale` times as large."""

    uses_source = False

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale

    def loss(self, student: Outputs, teacher: Outputs, batch: Any, clock: Clock) -> dict[str, Term]:
        values = student.logits.square().mean(1)
        return {"large": Term.of(1000.0 * values), "other": self.scale * Term.of(values)}


def warned(method: Distillation, steps: int, **settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(method, CNN(), CNN(width=6), images(), steps=steps, lr=1e-5, **settings)
        run.fit()
    found = [str(w.message) for w in caught if issubclass(w.category, TransferWarning)]
    assert found == list(run.watch.messages.values())  # said once, and kept for the report
    return found


def test_a_term_that_stays_exactly_zero_is_reported_once():
    (message,) = warned(KD() + 3.0 * ZeroTerm(), steps=120)
    assert "the term 'nothing' has been exactly 0 for 50 updates: it teaches nothing" in message
    assert warned(KD() + 3.0 * ZeroTerm(), steps=49) == []


class ZeroTerm(Scaled):
    def loss(self, student: Outputs, *rest: Any) -> dict[str, Term]:
        return {"nothing": Term.of(0.0 * student.logits.mean(1))}


def test_a_term_weighted_zero_by_a_schedule_is_meant_to_be_zero():
    assert warned(KD() + Linear(0, 0) * ZeroTerm(), steps=60) == []


def test_a_term_a_thousand_times_smaller_is_reported():
    (message,) = warned(Scaled(), steps=60)
    assert "the term 'other' has had less than 1% of the gradient for 50 updates (now 0.10%)" in message


def test_terms_of_like_size_are_not():
    assert warned(Scaled(scale=100.0), steps=60) == []
    assert warned(Scaled(), steps=50) == []


def test_hints_alone_warn_of_the_head_they_do_not_teach():
    (message,) = warned(Hints("layer1", "layer1"), steps=10)
    assert "4 parameter tensor(s) get no gradient from hints and stay as they are: target.fc.bias" in message
    assert warned(Hints("layer1", "layer1"), steps=9) == []
    assert warned(Hints("layer1", "layer1") + Labels(), steps=12) == []


def test_warnings_are_counted_on_over_a_resume(tmp_path):
    class Killed(BaseException):
        pass

    def stop(run: Any, record: Any) -> None:
        if run.updates == 30:
            raise Killed

    def run(listener: Any = None) -> Any:
        return trainer(
            KD() + 3.0 * ZeroTerm(),
            CNN(),
            CNN(width=6),
            images(),
            steps=55,
            folder=tmp_path,
            listener=listener,
            lr=1e-5,
        )

    with pytest.raises(Killed):
        run(stop).fit()
    resumed = run()
    with pytest.warns(TransferWarning, match="exactly 0 for 50 updates"):
        resumed.fit(resume=True)


# Numbers that are not finite


def nan_in(sample: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = images(24)
    inputs[sample, 0, 1, 2] = float("nan")
    return inputs, labels


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_nan_in_the_data_names_samples_and_stream(micro_batch):
    with pytest.raises(DivergenceError) as error:
        trainer(KD(), CNN(), CNN(width=6), nan_in(17), epochs=1, micro_batch=micro_batch).fit()
    message = str(error.value)
    assert "not finite: 'inputs' of stream 'data', samples [17]; so 'kd', 'labels' are not finite at" in message
    assert "Clean the data." in message


class Exploding(KD):
    """Its term becomes infinite after some updates."""

    def loss(self, *arguments: Any) -> dict[str, Term]:
        terms = super().loss(*arguments)
        factor = float("inf") if arguments[-1].step == 5 else 1.0
        return {"kd": terms["kd"], "blow": Term.of(arguments[0].logits.sum(1) * factor)}


def test_a_term_that_is_not_finite_is_named_and_the_last_good_checkpoint_kept(tmp_path):
    with pytest.raises(DivergenceError) as error:
        trainer(Exploding(), CNN(), CNN(width=6), images(), steps=9, folder=tmp_path).fit()
    message = str(error.value)
    newest = Checkpoints(tmp_path).newest
    assert newest.name == "update-5"
    assert "the loss 'blow' is not finite at update 5 of stage 0, phase 'student'" in message
    assert "Lower the learning rate" in message
    assert f"The last good checkpoint is kept in {newest}" in message


class Poisoned(KD):
    """Its loss is finite, the gradient is not."""

    def loss(self, *arguments: Any) -> dict[str, Term]:
        terms = super().loss(*arguments)
        if arguments[-1].step == 3:
            logits = arguments[0].logits
            terms["root"] = Term.of((0 * logits).sum(1).sqrt())  # 0 * infinity
        return terms


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    with pytest.raises(DivergenceError, match=r"no longer finite at update 4, so nothing was saved over the last good"):
        trainer(Poisoned(), CNN(), CNN(width=6), images(), steps=9, folder=tmp_path).fit()
    newest = Checkpoints(tmp_path).newest
    assert newest.name == "update-3"
    clean = CNN()
    trainer(Poisoned(), clean, CNN(width=6), images(), steps=9, folder=Path(tmp_path))._start(resume=True)
    assert all(p.isfinite().all() for p in clean.parameters())


# Fingerprints


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_a_fingerprint_sees_one_bit(dtype):
    module = nn.Module()
    module.register_buffer("x", torch.ones(3, 4, dtype=dtype))
    module.register_buffer("scalar", torch.ones((), dtype=dtype))
    before = fingerprint(module)
    assert fingerprint(module) == before
    module.x.T[2, 1] = 0
    after = fingerprint(module)
    assert {name for name in before if before[name] != after[name]} == {"x"}

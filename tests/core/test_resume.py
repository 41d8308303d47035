"""Killed at any point and resumed, a run ends bit-identical."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CNN, METHODS, digest, images, make, trainer
from processes import start
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from transfuse.core import rng
from transfuse.core.composition import Then
from transfuse.core.interruption import Interrupted
from transfuse.core.method import Method
from transfuse.core.trainer import Trainer
from transfuse.distill import KD, Hints, Labels

STEPS = 40


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Images with noise from all three generators."""

    def __init__(self) -> None:
        self.inputs, self.labels = images(24)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(1, 4, 4) + np.random.randn() + random.gauss(0, 1)
        return self.inputs[i] + 0.1 * noise, self.labels[i]


def generated() -> Iterator[tuple[Tensor, Tensor]]:
    data = Augmented()
    order = torch.randperm(24).tolist()
    for first in range(0, 24, 6):
        samples = [data[i] for i in order[first : first + 6]]
        yield torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])


def composed() -> Method:
    return KD() + 0.5 * Hints("layer2", "layer2")


CASES: dict[str, tuple[Callable[[], Method], Callable[[], Any], dict[str, Any]]] = {
    "data set": (composed, Augmented, {}),
    "shuffling loader": (composed, lambda: DataLoader(Augmented(), batch_size=6, shuffle=True), {}),
    "generator function": (composed, lambda: generated, {}),
    "sequence": (lambda: Then(Hints("layer2", "layer2"), KD()), Augmented, {}),
    "workers": (composed, Augmented, {"workers": 2}),
    "micro-batches": (composed, Augmented, {"micro_batch": 2}),
}


def build(case: str, folder: Path | None, **settings: Any) -> Trainer:
    method, data, more = CASES[case]
    return trainer(
        method(),
        CNN(dropout=0.3, norm=True, seed=7),
        CNN(width=6, seed=8),
        data(),
        folder=folder,
        **{"steps": STEPS, "optimizer": "adamw", "lr": 0.01, "schedule": "cosine", "clip": 0.5, "ema": 0.9, "warmup": 3}
        | more
        | settings,
    )


def outcome(run: Trainer, resume: bool) -> dict[str, Any]:
    return {"student": digest(run.fit(resume=resume)), "history": run.history, "updates": run.updates}


def work(case: str, folder: Path) -> None:
    """One life of a process: go on where the last one was killed."""
    (folder.parent / f"{folder.name}.json").write_text(json.dumps(outcome(build(case, folder), resume=True)))


def unbroken(case: str) -> dict[str, Any]:
    return json.loads(json.dumps(outcome(build(case, None), resume=False)))


def killed_and_resumed(case: str, folder: Path, moments: list[float | str]) -> dict[str, Any]:
    """The result of a run that is killed with SIGKILL at each moment: so long after its start, or during a save."""
    result = folder.parent / f"{folder.name}.json"
    kills = 0
    for moment in moments:
        process = start(work, case, folder)
        seen = {p.name for p in folder.glob("update-*")}
        while process.is_alive() and not {p.name for p in folder.glob("update-*")} - seen:
            time.sleep(0.001)  # it works now
        if moment == "saving":
            while process.is_alive() and not list(folder.glob("update-*.tmp/*")):
                pass
        else:
            time.sleep(float(moment))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        assert not result.exists(), "the run ended before it was killed: make it longer"
    assert kills == len(moments)
    process = start(work, case, folder)
    process.join()
    assert process.exitcode == 0
    return json.loads(result.read_text())


def test_killed_at_five_random_moments_it_ends_bit_identical(tmp_path):
    draw = random.Random(20261121)
    moments: list[float | str] = [
        draw.uniform(0, 0.03),
        "saving",
        draw.uniform(0, 0.03),
        draw.uniform(0, 0.03),
        "saving",
    ]
    assert killed_and_resumed("data set", tmp_path / "run", moments) == unbroken("data set")


@pytest.mark.parametrize("case", [c for c in CASES if c != "data set"])
def test_killed_once_it_ends_bit_identical_with(case, tmp_path):
    moment = random.Random(case).uniform(0.0, 0.1)
    assert killed_and_resumed(case, tmp_path / "run", [moment]) == unbroken(case)


# Simulated kills: after an update, before its checkpoint.


class Killed(BaseException):
    pass


def kill_at(update: int) -> Callable[..., None]:
    def listener(run: Trainer, record: Any) -> None:
        if run.updates == update:
            raise Killed

    return listener


def disturb() -> None:
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)


def run_of(method: Method, folder: Path | None = None, listener: Any = None, norm: bool = True) -> Trainer:
    return trainer(
        method,
        CNN(dropout=0.3, norm=norm, seed=7),
        CNN(width=6, seed=8),
        Augmented(),
        folder=folder,
        listener=listener,
        steps=9,
        optimizer="adamw",
        lr=0.01,
        clip=1.0,
    )


@pytest.mark.parametrize("update", [1, 3, 5, 8], ids=["first", "1/3", "1/2", "last but one"])
@pytest.mark.parametrize("cls", [c for c in METHODS if "classification" in c.card.tasks], ids=lambda c: c.__name__)
def test_every_method_resumes_bit_equal(cls, update, tmp_path):
    whole = run_of(make(cls))
    expected = digest(whole.fit())
    with pytest.raises(Killed):
        run_of(make(cls), tmp_path, kill_at(update)).fit()
    disturb()
    resumed = run_of(make(cls), tmp_path)
    assert digest(resumed.fit(resume=True)) == expected
    assert resumed.history == whole.history
    assert digest(resumed.method) == digest(whole.method)


def broken_generators(self: Trainer, shared: dict[str, Any]) -> None:
    honest(self, {**shared, "rng": rng.state()})


def broken_optimizer(self: Trainer, shared: dict[str, Any]) -> None:
    empty = {name: {**o, "state": {}} for name, o in shared["optimizers"].items()}
    honest(self, {**shared, "optimizers": empty})


def broken_position(self: Trainer, shared: dict[str, Any]) -> None:
    honest(self, {**shared, "cursors": {"data": {"epoch": 0, "offset": 0}}})


honest = Trainer._load_stage


@pytest.mark.parametrize("sabotage", [broken_generators, broken_optimizer, broken_position])
def test_this_test_can_see_what_is_not_restored(sabotage, tmp_path, monkeypatch):
    expected = digest(run_of(KD()).fit())
    with pytest.raises(Killed):
        run_of(KD(), tmp_path, kill_at(5)).fit()
    disturb()
    monkeypatch.setattr(Trainer, "_load_stage", sabotage)
    assert digest(run_of(KD(), tmp_path).fit(resume=True)) != expected


def test_a_run_that_ended_is_not_trained_again(tmp_path):
    done = digest(run_of(KD(), tmp_path).fit())
    again = run_of(KD(), tmp_path)
    assert digest(again.fit(resume=True)) == done
    assert again.updates == 9


def test_without_a_checkpoint_resuming_is_starting(tmp_path):
    assert digest(run_of(KD(), tmp_path).fit(resume=True)) == digest(run_of(KD()).fit())


def test_objects_without_a_name_of_their_own_do_not_stop_a_resume(tmp_path):
    def optimizer() -> Callable[..., Any]:
        return lambda groups: torch.optim.SGD(groups, lr=0.1)

    def run(listener: Any = None) -> Trainer:
        method, target = KD(), CNN(seed=7)
        return trainer(method, target, CNN(), images(), folder=tmp_path, optimizer=optimizer(), listener=listener)

    with pytest.raises(Killed):
        run(kill_at(2)).fit()
    run().fit(resume=True)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_validation_and_the_best_state_survive_a_kill(keep, tmp_path):
    class Keeping(KD):
        def stage(self, i: int, run: Any) -> Any:
            stage = super().stage(i, run)
            stage.keep = keep
            return stage

    def run(folder: Path | None, listener: Any = None) -> Trainer:
        def validate(model: Any) -> float:
            return [3.0, 9.0, 1.0, 2.0][made.clock.step // 2 - 1]

        made = trainer(
            Keeping(),
            CNN(seed=7),
            CNN(),
            Augmented(),
            folder=folder,
            listener=listener,
            validate=validate,
            steps=8,
            validate_every=2,
            lr=0.5,
        )
        return made

    whole = run(None)
    expected = digest(whole.fit())
    with pytest.raises(Killed):
        run(tmp_path, kill_at(6)).fit()
    resumed = run(tmp_path)
    assert digest(resumed.fit(resume=True)) == expected
    assert resumed.history == whole.history


# Interrupts


def interrupted(folder: Path) -> None:
    def listener(run: Trainer, record: Any) -> None:
        if run.updates == 3:
            os.kill(os.getpid(), signal.SIGINT)

    run = build("data set", folder, checkpoint_every=1e9)
    run.listener = listener
    try:
        run.fit()
    except Interrupted as error:
        (folder.parent / "message").write_text(str(error))
        raise


def test_control_c_writes_a_checkpoint_and_says_how_to_go_on(tmp_path):
    process = start(interrupted, tmp_path / "run")
    process.join()
    assert process.exitcode == 1
    message = (tmp_path / "message").read_text()
    newest = tmp_path / "run" / "update-3"
    assert newest.exists()
    assert f"stopped after update 3; the checkpoint is {newest}. Go on with `transfuse resume`" in message
    assert "fit(resume=True)" in message
    resumed = build("data set", tmp_path / "run", checkpoint_every=1e9)
    assert json.loads(json.dumps(outcome(resumed, resume=True))) == unbroken("data set")


def test_control_c_without_a_folder_says_that_nothing_was_saved():
    def stop(run: Trainer, record: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="after update 1; no folder was given, so nothing was saved"):
        trainer(Labels(), CNN(), None, images(), listener=stop).fit()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest
from accelerate import PartialState
from accelerate.logging import get_logger
from helpers import CNN, digest, images, language_model, ragged_tokens
from processes import on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from transfuse import Transfer
from transfuse.core import rng
from transfuse.core.errors import InputError, MissingExtraError
from transfuse.core.interruption import Interrupted
from transfuse.core.trainer import Trainer
from transfuse.distill import KD, Labels
from transfuse.experiment import Result
from transfuse.recipe import Recipe

RECIPE = """
method: KD
source: {model: mlp, train: {steps: 2, data: {name: digits}}}
target: {model: mlp, args: {hidden: [4]}}
data: digits
training: {steps: 2}
track: [tensorboard]
"""


def started(out: Path | None, **options: Any) -> Transfer:
    settings = {"epochs": 2, "batch_size": 6, "lr": 0.5, "schedule": "constant", "track": ["tensorboard"]}
    models = {"source": CNN(seed=1), "target": CNN()}
    return Transfer(KD(), data=images(), validate=images(), **{"out": out, **models, **settings, **options})


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of one run: step and value of every point of every scalar."""
    events = EventAccumulator(str(folder)).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def runs(folder: Path) -> set[str]:
    return {str(path.parent.relative_to(folder)) for path in folder.rglob("events.out.tfevents.*")}


def expected(result: Result, name: str) -> list[tuple[int, float]]:
    """The same points, from the learning curve that the report has."""
    curve = result.arms[0].runs[0].curve
    points = [(r["step"], r[name] if name in r else r["terms"]["kd"][name.split("/")[-1]]) for r in curve]
    return [(step, pytest.approx(value)) for step, value in points if value is not None]


@pytest.fixture(autouse=True)
def _no_stray_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert not list(Path.cwd().iterdir())


def test_tensorboard_shows_the_learning_curve_of_the_report(tmp_path: Path) -> None:
    result = started(tmp_path, seeds=[3]).run()
    found = curves(tmp_path / "tracking" / "kd" / "seed-3")
    names = ["loss", "validate", "terms/kd/raw", "terms/kd/weighted", "terms/kd/gradient_norm"]
    for name in names:
        assert found[name], name
        assert found[name] == expected(result, name), name
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]
    assert found["lr/student"] == [(step, 0.5) for step in (1, 2, 3, 4)]


def test_a_metric_of_which_less_is_better_is_shown_as_it_is(tmp_path: Path) -> None:
    data = ragged_tokens()
    options = {"validate": data, "steps": 2, "batch_size": 6, "out": tmp_path, "track": ["tensorboard"]}
    transfer = Transfer(Labels(), None, language_model(), data, **options)
    result = transfer.run()
    assert transfer.metric == "nll"
    shown = curves(tmp_path / "tracking" / "labels" / "seed-0")["validate"]
    assert shown == expected(result, "validate")
    assert shown[-1][1] > 0


def test_every_arm_with_every_seed_is_a_run(tmp_path: Path) -> None:
    started(tmp_path, seeds=[0, 1], compare=["shuffled teacher"]).run()
    arms = ["kd", "shuffled-teacher"]
    assert runs(tmp_path / "tracking") == {f"{arm}/seed-{seed}" for arm in arms for seed in (0, 1)}


def test_a_resumed_run_goes_on_without_doubled_points(tmp_path: Path) -> None:
    def stop(arm: str, seed: int, trainer: Trainer, record: Any) -> None:
        if trainer.updates == 3:
            raise Interrupted("stopped")

    whole = started(tmp_path / "whole").run()
    with pytest.raises(Interrupted):
        started(tmp_path / "cut", listener=stop).run()
    folder = tmp_path / "cut" / "tracking" / "kd" / "seed-0"
    assert [step for step, _ in curves(folder)["loss"]] == [1, 2]
    started(tmp_path / "cut").run(resume=True)
    assert curves(folder)["loss"] == expected(whole, "loss")
    files = list(folder.iterdir())
    started(tmp_path / "cut").run(resume=True)
    assert list(folder.iterdir()) == files, "what is finished is not tracked again"


class Fake(accelerate.tracking.GeneralTracker):
    """A tracker with projects that notes what happens, and draws random numbers as it likes."""

    name = "wandb"
    requires_logging_directory = False
    tracker = None
    seen: list[Any]

    def __init__(self, project: str, name: str):
        super().__init__()
        self.seen.append(("init", project, name))

    def start(self) -> None:
        get_logger(__name__).debug("started")  # as Accelerate's own do
        rng.seed_all(0)
        self.seen.append("start")

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self.seen.append(step)

    def finish(self) -> None:
        self.seen.append("finish")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", ["wandb"])
    PartialState._reset_state()
    Fake.seen = []
    return Fake.seen


def test_a_tracker_with_projects_has_the_transfer_as_its_project(seen: list[Any]) -> None:
    started(None, track=["wandb"], name="My #1: try", seeds=[0, 1], epochs=1).run()
    one, two = [["start", 1, 2, "finish"]] * 2
    assert seen == [("init", "my-1-try", "kd/seed-0"), *one, ("init", "my-1-try", "kd/seed-1"), *two]


def test_a_tracker_that_draws_random_numbers_changes_nothing(seen: list[Any]) -> None:
    model, tracked = (started(None, track=track, target=CNN(dropout=0.5)).run().model for track in ([], ["wandb"]))
    assert "start" in seen
    assert digest(tracked) == digest(model)


def test_trackers_are_closed_when_training_fails(seen: list[Any]) -> None:
    def fail(arm: str, seed: int, trainer: Trainer, record: Any) -> None:
        if trainer.updates == 2:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        started(None, track=["wandb"], listener=fail).run()
    assert seen[-2:] == [1, "finish"]


def test_a_listener_and_the_bars_hear_the_same_updates(seen: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[int] = []
    started(None, track=["wandb"], listener=lambda a, s, t, record: heard.append(t.updates), progress=True).run()
    assert heard == [1, 2, 3, 4] == [step for step in seen if isinstance(step, int)]
    assert "KD(), seed 0: done" in capsys.readouterr().err


def test_a_dry_run_tracks_nothing(seen: list[Any]) -> None:
    started(None, track=["wandb"]).check()
    assert seen == []


def one_of_two(folder: Path, rank: int) -> None:
    started(folder, device="cpu").run()
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(None))


def test_of_several_processes_the_first_one_tracks(tmp_path: Path) -> None:
    on_ranks(one_of_two, tmp_path)
    assert len(list((tmp_path / "tracking").rglob("events.out.*"))) == 1


# Refused before training


def test_an_unknown_tracker_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tracker is called 'tensorbord': did you mean 'tensorboard'"):
        started(tmp_path, track=["tensorbord"])


def test_a_tracker_that_writes_files_needs_a_folder() -> None:
    with pytest.raises(InputError, match=r"'tensorboard' writes files and needs a folder: pass out="):
        started(None, track="tensorboard")


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(MissingExtraError, match=r'pip install "transfuse\[track\]"'):
        started(tmp_path)
    with pytest.raises(InputError, match="'mlflow' needs the package mlflow"):
        started(tmp_path, track=["mlflow"])


def test_nothing_is_imported_unless_asked_for() -> None:
    code = "import sys, transfuse.experiment; sys.exit(bool({'accelerate', 'tensorboard'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Recipes


def test_a_recipe_tracks_the_transfer_and_the_training_of_its_source(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    Recipe.read(tmp_path / "tiny.yaml", out=tmp_path / "out").run()
    assert runs(tmp_path / "out") == {"tracking/kd/seed-0", "source/tracking/labels/seed-0"}


def test_a_recipe_with_an_unknown_tracker_is_refused_by_the_dry_run(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("[tensorboard]", "[wandbb]"))
    with pytest.raises(InputError, match=r"tiny.yaml: .*no tracker is called 'wandbb': did you mean 'wandb'"):
        Recipe.read(tmp_path / "tiny.yaml", out=tmp_path / "out").check()

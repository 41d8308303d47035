"""The command line as a process of its own: killed, stopped, and several of them together."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., subprocess.Popen[str]]
Write = Callable[..., Path]

# Long enough to be stopped in the middle, with a checkpoint after every update.
LONG = {"training": {"steps": 60, "batch_size": 8, "lr": 0.01, "ema": 0.9, "checkpoint_every": 0}}


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    code = process.wait(120)
    return code, Path("out.txt").read_text(), Path("err.txt").read_text()


def wait_for(pattern: str, process: subprocess.Popen[str], count: int = 1) -> None:
    """Wait until so many files of the run exist."""
    deadline = time.monotonic() + 60
    while len(list(Path("runs").glob(pattern))) < count:
        assert process.poll() is None, Path("err.txt").read_text()
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.005)


def measured(report: Path) -> list[Any]:
    """Everything in a report that must not depend on where a run was stopped."""
    arms = json.loads(report.read_text())["arms"]
    for arm in arms:
        for run in arm["runs"]:
            del run["seconds"]
    return arms


@pytest.mark.parametrize(
    "moment",
    ["tiny/source/arms/labels/seed-0/checkpoints/update-[1-9]*", "tiny/arms/kd/seed-0/checkpoints/update-[1-9]*"],
    ids=["while the source is trained", "while the method is trained"],
)
def test_killed_and_resumed_it_ends_as_if_nothing_had_happened(start: Start, write: Write, moment: str) -> None:
    recipe = write({**LONG, "source.train.checkpoint_every": 0, "source.train.steps": 60})
    assert finish(start("transfuse", "run", recipe, "--out", "whole", "--quiet"))[0] == 0
    process = start("transfuse", "run", recipe)
    wait_for(moment, process)
    process.kill()
    process.wait()
    assert not Path("runs/tiny/report.json").exists()
    recipe.unlink()  # the folder is enough
    code, out, err = finish(start("transfuse", "resume", "runs/tiny"))
    assert code == 0, err
    assert "Report: runs/tiny/report.html" in out
    assert measured(Path("runs/tiny/report.json")) == measured(Path("whole/report.json"))
    assert Path("runs/tiny/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_ctrl_c_keeps_what_was_done_and_says_how_to_go_on(start: Start, write: Write) -> None:
    process = start("transfuse", "run", write(LONG))
    wait_for("tiny/arms/kd/seed-0/checkpoints/update-[1-9]*", process)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, out) == (130, "")
    assert "Go on with: transfuse resume runs/tiny" in err
    assert "Traceback" not in err
    assert list(Path("runs/tiny/arms/kd/seed-0/checkpoints").glob("update-*"))
    assert finish(start("transfuse", "resume", "runs/tiny", "-q"))[0] == 0


def test_two_processes_find_what_one_finds(start: Start, write: Write) -> None:
    recipe = write()
    launch = ("accelerate.commands.launch", "--cpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no")
    code, out, err = finish(start(*launch, "--dynamo_backend", "no", "-m", "transfuse", "run", recipe, "--out", "two"))
    assert code == 0, err
    assert out.count("Report: two/report.html") == 1
    assert finish(start("transfuse", "run", recipe, "--out", "one", "--quiet"))[0] == 0
    for two, one in zip(measured(Path("two/report.json")), measured(Path("one/report.json")), strict=True):
        assert two["runs"][0]["metrics"] == pytest.approx(one["runs"][0]["metrics"], abs=1e-4)
        assert [p["loss"] for p in two["runs"][0]["curve"]] == pytest.approx(
            [p["loss"] for p in one["runs"][0]["curve"]], abs=1e-4
        )

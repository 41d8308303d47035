"""The command line as a process of its own: killed, stopped, and several of them together."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from typer.testing import Result

Run = Callable[..., Result]
Write = Callable[..., Path]

# Long enough to be stopped in the middle, with a checkpoint after every update.
LONG = {
    "training": {"steps": 60, "batch_size": 8, "lr": 0.01, "ema": 0.9, "checkpoint_every": 0},
    "source.train": {"steps": 60, "batch_size": 8, "lr": 0.01, "checkpoint_every": 0},
}
SOURCE = "tiny/source/arms/labels/seed-0/checkpoints/update-[1-9]*"
METHOD = "tiny/arms/kd/seed-0/checkpoints/update-[1-9]*"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # as in the processes, so that sums are the same bit by bit


def command(folder: str, *arguments: str) -> None:
    """The command line, in a process that was just forked."""
    from transfuse.cli import app

    os.chdir(folder)
    torch.set_num_threads(1)
    app(arguments)


def wait_for(pattern: str, alive: Callable[[], bool]) -> None:
    """Wait until the run has written this."""
    deadline = time.monotonic() + 60
    while not list(Path("runs").glob(pattern)):
        assert alive()
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.002)


def measured(report: Path) -> list[Any]:
    """Everything in a report that must not depend on where a run was stopped."""
    arms = json.loads(report.read_text())["arms"]
    for arm in arms:
        for run in arm["runs"]:
            del run["seconds"]
    return arms


def test_killed_and_resumed_it_ends_as_if_nothing_had_happened(transfuse: Run, write: Write) -> None:
    recipe = write(LONG)
    assert transfuse("run", recipe, "--out", "whole", "--quiet").exit_code == 0
    for arguments, moment in ((("run", str(recipe)), SOURCE), (("resume", "runs/tiny"), METHOD)):
        process = processes.start(command, os.getcwd(), *arguments, "--quiet")
        wait_for(moment, process.is_alive)
        process.kill()
        process.join()
        assert not Path("runs/tiny/report.json").exists()
        recipe.unlink(missing_ok=True)  # the folder is enough to go on
    done = transfuse("resume", "runs/tiny")
    assert done.exit_code == 0, done.output
    assert "Report: runs/tiny/report.html" in done.stdout
    assert measured(Path("runs/tiny/report.json")) == measured(Path("whole/report.json"))
    assert Path("runs/tiny/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_ctrl_c_keeps_what_was_done_and_says_how_to_go_on(transfuse: Run, write: Write, start: Any) -> None:
    process = start("transfuse", "run", write(LONG))
    wait_for(METHOD, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    said = Path("err.txt").read_text()
    assert "Go on with: transfuse resume runs/tiny" in said
    assert "Traceback" not in said
    assert Path("out.txt").read_text() == ""
    assert transfuse("resume", "runs/tiny", "--quiet").exit_code == 0


def test_two_processes_find_what_one_finds(transfuse: Run, write: Write, start: Any) -> None:
    recipe = write()
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    process = start(*launch, *plain, "-m", "transfuse", "run", recipe, "--out", "two")
    assert process.wait(120) == 0, Path("err.txt").read_text()
    assert Path("out.txt").read_text().count("Report: two/report.html") == 1
    assert transfuse("run", recipe, "--out", "one", "--quiet").exit_code == 0
    for two, one in zip(measured(Path("two/report.json")), measured(Path("one/report.json")), strict=True):
        assert two["runs"][0]["metrics"] == pytest.approx(one["runs"][0]["metrics"], abs=1e-4)
        assert [p["loss"] for p in two["runs"][0]["curve"]] == pytest.approx(
            [p["loss"] for p in one["runs"][0]["curve"]], abs=1e-4
        )

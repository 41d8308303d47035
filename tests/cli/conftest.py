"""A tiny recipe in a folder of its own, and ways to run the command line on it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from transfuse.cli import app

DATA = '''
import torch
from torch import nn
from torch.utils.data import TensorDataset


def load(classes=3, channels=1, size=48, wrong_label=None, only_class=None, nan=None, as_dict=False):
    """Images whose brightest column is their class; a third of the train part has no label."""
    draw = torch.Generator().manual_seed(0)

    def part(count):
        labels = torch.arange(count) % classes
        images = torch.rand(count, channels, 4, 4, generator=draw)
        images[torch.arange(count), :, :, labels] += 1.0
        return images, labels

    images, labels = part(size)
    labels[::3] = -100
    if wrong_label is not None:
        labels[1] = wrong_label
    if only_class is not None:
        labels[labels != -100] = only_class
    if nan is not None:
        images[nan] = float("nan")
    parts = TensorDataset(images, labels), TensorDataset(*part(24)), TensorDataset(*part(24))
    names = tuple(str(i) for i in range(classes))
    return {"train": parts[0], "validate": parts[1], "test": parts[2], "classes": names} if as_dict else parts


class Net(nn.Sequential):
    def __init__(self, width=6, classes=3, channels=1):
        super().__init__()
        self.layer1 = nn.Conv2d(channels, width, 3, padding=1)
        self.layer2 = nn.Conv2d(width, width, 3, padding=1)
        self.pool = nn.Flatten()
        self.fc = nn.Linear(16 * width, classes)
'''

RECIPE: dict[str, Any] = {
    "method": "KD",
    "source": {"model": "own.py:Net", "args": {"width": 8}, "train": {"steps": 20, "batch_size": 8, "lr": 0.01}},
    "target": {"model": "own.py:Net", "args": {"width": 2}},
    "data": "own.py:load",
    "training": {"steps": 4, "batch_size": 8, "lr": 0.01},
    "compare": ["scratch"],
}


def changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with other values at dotted places; None removes a key."""
    copied = copy.deepcopy(base)
    for place, value in changes.items():
        *path, last = place.split(".")
        part = copied
        for step in path:
            part = part.setdefault(step, {})
        if value is None:
            part.pop(last)
        else:
            part[last] = value
    return copied


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write the tiny recipe, with changes, into a folder that has become the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(DATA)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "own", raising=False)  # another test's module of the same name

    def write(changes: dict[str, Any] | None = None, name: str = "tiny.yaml") -> Path:
        (tmp_path / name).write_text(yaml.safe_dump(changed(RECIPE, changes or {}), sort_keys=False))
        return Path(name)

    return write


@pytest.fixture
def transfuse() -> Callable[..., Result]:
    """Run the command line in this process."""
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `python -m ARGUMENTS` in a process of its own, with what it prints in files `out.txt` and `err.txt`."""
    processes = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (tmp_path / "out.txt").open("w") as out, (tmp_path / "err.txt").open("w") as err:
            command = [sys.executable, "-m", *map(str, arguments)]
            processes.append(subprocess.Popen(command, stdout=out, stderr=err, text=True, env=environment))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()

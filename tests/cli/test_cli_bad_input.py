"""What a recipe can get wrong: one clear error, exit code 2 (1 for files), nothing trained and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import Result

Run = Callable[..., Result]
Write = Callable[..., Path]

HINTS = {"name": "Hints", "teacher": "layer2"}
UNTRAINED = {"model": "own.py:Net", "args": {"width": 8}}


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param({"training.batchsize": 8}, ["training.batchsize", "'batch_size'"], id="unknown key"),
        pytest.param({"method": "Hintz"}, ["no method is called 'Hintz'", "'Hints'"], id="unknown method"),
        pytest.param({"method": {**HINTS, "student": "layr1"}}, ["layr1", "did you mean 'layer1'"], id="missing layer"),
        pytest.param({"data.args.wrong_label": 7}, ["7", "0 to 2"], id="wrong label range"),
        pytest.param({"data.args.only_class": 1}, ["one class alone"], id="one class"),
        pytest.param({"data.args.size": 0}, ["empty"], id="empty split"),
        pytest.param({"data.args.channels": 3}, ["cannot run on this data", "(8, 3, 4, 4)"], id="channel mismatch"),
        pytest.param({"target.args.classes": 5}, ["the target has 5 classes", "3"], id="class counts"),
        pytest.param({"data.args.nan": 5}, ["not finite", "samples [5]"], id="NaN in data"),
        pytest.param({"data.args.size": 6}, ["6 samples, fewer than one batch of 8"], id="shorter than a batch"),
        pytest.param({"compare": ["scratch", "scratch"]}, ["two arms have the same name"], id="same arm twice"),
        pytest.param({"seeds": [1, 1]}, ["seeds are [1, 1]"], id="same seed twice"),
        pytest.param({"source": None}, ["needs a source"], id="no source"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_error_before_any_work(
    transfuse: Run, write: Write, command: str, changes: dict[str, Any], said: list[str]
) -> None:
    recipe = write({"data": {"name": "own.py:load", "args": {"as_dict": True}}, **changes})
    done = transfuse(command, recipe)
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert all(words in done.stderr for words in said), done.stderr
    assert done.exit_code in ((1,) if command == "check" or "not finite" in said else (2,))
    assert not Path("runs").exists()


def test_truncated_weights_are_refused(transfuse: Run, write: Write) -> None:
    save_file({"fc.weight": torch.rand(3, 128)}, "teacher.safetensors")
    whole = Path("teacher.safetensors").read_bytes()
    Path("teacher.safetensors").write_bytes(whole[:-10])
    done = transfuse("run", write({"source": {**UNTRAINED, "weights": "teacher.safetensors"}}))
    assert done.exit_code == 1
    assert "truncated" in done.stderr
    assert not Path("runs").exists()


def test_a_pickle_from_a_stranger_is_refused_and_says_how_to_convert(transfuse: Run, write: Write) -> None:
    recipe = write({"source": {**UNTRAINED, "weights": "stranger.pt"}})
    torch.save(nn.Linear(2, 2), "stranger.pt")
    done = transfuse("run", recipe)
    assert done.exit_code == 1
    assert "refused" in done.stderr
    assert "safetensors.torch.save_file" in done.stderr


def test_weights_of_another_model_are_refused_with_the_differences(transfuse: Run, write: Write) -> None:
    recipe = write({"source": {**UNTRAINED, "weights": "other.safetensors"}})
    save_file({"fc.weight": torch.rand(3, 7)}, "other.safetensors")
    done = transfuse("run", recipe)
    assert done.exit_code == 2
    assert "do not fit" in done.stderr
    assert "missing layer1.weight" in done.stderr


def test_data_that_turns_bad_during_training_keeps_the_last_checkpoint(transfuse: Run, write: Write) -> None:
    data = {"name": "own.py:load", "args": {"nan": 40}}  # further on than the dry run looks
    training = {"steps": 6, "batch_size": 8, "shuffle": False}
    done = transfuse("run", write({"data": data, "source": UNTRAINED, "training": training, "compare": []}))
    assert done.exit_code == 1
    assert "'inputs' of stream 'data', samples [40]" in done.stderr
    assert "The last good checkpoint is kept in runs/tiny/arms/kd/seed-0/checkpoints/update-0" in done.stderr
    assert Path("runs/tiny/arms/kd/seed-0/checkpoints/update-0").is_dir()

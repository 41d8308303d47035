"""`transfuse chat` on a model that a run has written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from transfuse.cli import app
from transfuse.recipe import Recipe

RECIPE = {
    "method": {"name": "KD", "temperature": 1, "alpha": 1},
    "source": {
        "model": "decoder-lm",
        "args": {"dim": 16, "depth": 1, "context": 32},
        "store": {"draws": 20, "batch_size": 4},
    },
    "target": {"model": "decoder-lm", "args": {"dim": 8, "depth": 1, "heads": 2, "context": 32}},
    "data": {"name": "text", "args": {"context": 32}},
    "compare": ["scratch", {"name": "RSKD"}],
    "training": {"steps": 2, "batch_size": 4},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; its text is a small file."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "text.txt").write_text("all that is said here is said again. " * 200)
    content = {**RECIPE, "data": {"name": "text", "args": {"files": "text.txt", "context": 32}}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    Recipe.read(folder / "recipe.yaml", out=folder / "run").run()
    return folder / "run"


def invoke(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["chat", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_it_continues_a_prompt_the_same_way_every_time(run: Path) -> None:
    given = (str(run), "--tokenizer", "bytes", "--prompt", "all that", "--max-new-tokens", "12")
    code, text, _ = invoke(*given)
    assert code == 0
    assert invoke(*given) == (code, text, "")
    drawn = invoke(*given, "--temperature", "1", "--seed", "3")[1]
    assert drawn == invoke(*given, "--temperature", "1", "--seed", "3")[1]
    assert drawn != text


def test_what_is_missing_is_named(run: Path, tmp_path: Path) -> None:
    code, _, error = invoke(str(run), "--prompt", "x")
    assert code == 2
    assert "give --tokenizer" in error
    code, _, error = invoke(str(run), "--tokenizer", "bytes")
    assert code == 2
    assert "give --prompt" in error
    assert "neither the folder of a run" in invoke(str(tmp_path), "--prompt", "x")[2]
    assert "prompt is empty" in invoke(str(run), "--tokenizer", "bytes", "--prompt", "")[2]
    (run / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert "finish its run" in invoke(str(run), "--tokenizer", "bytes", "--prompt", "x")[2]
    (tmp_path / "model.safetensors").rename(run / "model.safetensors")


def test_the_store_of_a_recipe_is_built_once_and_read_by_the_arm_that_wants_it(run: Path) -> None:
    assert (run / "store" / "store.json").exists()
    assert (run / "arms" / "rskd" / "seed-0" / "run.safetensors").exists()


def test_a_store_alone_can_be_a_source(run: Path, tmp_path: Path) -> None:
    content = {
        **RECIPE,
        "method": "RSKD",
        "source": {"store": str((run / "store").resolve())},
        "data": {"name": "text", "args": {"files": str(run.parent / "text.txt"), "context": 32}},
        "compare": ["scratch"],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    result = Recipe.read(tmp_path / "recipe.yaml", out=tmp_path / "run").run()
    assert result.report.source is not None

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import Result

from transfuse import __version__
from transfuse.cli import starter
from transfuse.core import catalogue

Run = Callable[..., Result]
Write = Callable[..., Path]
COMMANDS = ["run", "resume", "check", "report", "methods", "show", "new", "merge"]


def heavy_modules(*arguments: str) -> list[str]:
    """Which heavy modules a command line has imported when it ends."""
    code = f"""
import sys
from transfuse.cli import app
try:
    app({list(arguments)!r})
except SystemExit:
    print(sorted(set(sys.modules) & {{"torch", "numpy", "yaml", "plotly", "accelerate"}}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stderr.splitlines()[-1].replace("'", '"'))


# Help


@pytest.mark.parametrize(
    "arguments", [("--help",), ("run", "--help"), ("methods",), ("methods", "--json"), ("--version",)]
)
def test_help_and_catalogue_import_nothing_heavy(arguments: tuple[str, ...]) -> None:
    assert heavy_modules(*arguments) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_and_says_what_comes_next(transfuse: Run, command: str) -> None:
    said = transfuse(command, "--help").output
    assert "Example:" in said
    assert f"transfuse {command}" in said
    assert "Next:" in said or "Afterwards" in said


def test_the_help_names_every_command(transfuse: Run) -> None:
    said = transfuse("--help").output
    assert all(command in said for command in COMMANDS)


def test_version(transfuse: Run) -> None:
    assert transfuse("--version").output == f"transfuse {__version__}\n"


# Catalogue


def test_methods_lists_the_whole_catalogue(transfuse: Run) -> None:
    said = transfuse("methods").output
    assert all(entry.name in said for entry in catalogue.entries())
    found = json.loads(transfuse("methods", "--json").output)
    assert [m["name"] for m in found] == [e.name for e in catalogue.entries()]
    assert all({"name", "sheet", "family", "module", "tests", "proofs"} <= m.keys() for m in found)
    assert all(m["tests"] for m in found)


def test_methods_keeps_what_fits(transfuse: Run) -> None:
    found = json.loads(transfuse("methods", "--teacher", "full", "--data", "unlabelled", "--json").output)
    assert "KD" in [m["name"] for m in found]
    assert not {"Hints", "Labels"} & {m["name"] for m in found}
    assert "No method fits" in transfuse("methods", "--data", "private", "--want", "smaller").output
    wanted = json.loads(transfuse("methods", "--want", "many-clients", "--json").output)
    assert {m["family"] for m in wanted} == {"federated"}


def test_methods_answers_an_unknown_word_with_the_nearest(transfuse: Run) -> None:
    done = transfuse("methods", "--data", "unlabeled")
    assert done.exit_code == 2
    assert "did you mean 'unlabelled'" in done.stderr


def test_show_explains_a_method(transfuse: Run) -> None:
    said = transfuse("show", "kd").output
    assert "loss = (1 - alpha)" in said
    assert "arXiv:1503.02531" in said
    assert "{name: KD, temperature: 4.0, alpha: 0.9}" in said
    found = json.loads(transfuse("show", "KD", "--json").output)
    assert yaml.safe_load(found["recipe"]) == {"name": "KD", "temperature": 4.0, "alpha": 0.9}


def test_show_answers_an_unknown_method_with_the_nearest(transfuse: Run) -> None:
    done = transfuse("show", "Hint")
    assert done.exit_code == 2
    assert "did you mean 'Hints'" in done.stderr


# Starter


PYTHON_ONLY = {"RankC", "UniCAM", *starter.PYTHON_ONLY}
"""Measures of several models or of facts, and methods with data of their own, which a recipe cannot name."""


@pytest.mark.parametrize("method", sorted(PYTHON_ONLY))
def test_what_a_recipe_cannot_say_is_refused_with_the_way_out(transfuse: Run, tmp_path: Path, method: str) -> None:
    done = transfuse("new", str(tmp_path / "start.yaml"), "--method", method)
    assert done.exit_code == 2
    assert f"transfuse show {method}" in done.output


@pytest.mark.parametrize("method", [e.name for e in catalogue.entries() if e.name not in PYTHON_ONLY])
def test_the_starter_recipe_of_every_method_passes_the_check(
    transfuse: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert transfuse("new", "start.yaml", "--method", method).exit_code == 0
    done = transfuse("check", "start.yaml")
    assert done.exit_code == 0, done.output


def test_new_replaces_nothing(transfuse: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("precious")
    done = transfuse("new", tmp_path / "mine.yaml")
    assert done.exit_code == 2
    assert (tmp_path / "mine.yaml").read_text() == "precious"


# Check


def test_check_shows_data_models_taps_and_estimates(transfuse: Run, write: Write) -> None:
    recipe = write({"method": ["KD", {"name": "Hints", "student": "layer1", "teacher": "layer2", "weight": 0.5}]})
    done = transfuse("check", recipe)
    assert done.exit_code == 0
    assert "(8, 2, 4, 4)" in done.stdout
    assert "(8, 8, 4, 4)" in done.stdout
    found = json.loads(transfuse("check", recipe, "--json").stdout)
    assert found["ok"]
    assert found["data"]["data"] == {"samples": 48, "updates_per_epoch": 6}
    assert found["models"]["target"]["taps"] == {"layer1": [8, 2, 4, 4]}
    assert found["models"]["source"]["taps"] == {"layer2": [8, 8, 4, 4]}
    assert found["estimate"]["memory_mb"] > 0
    assert found["lessons"]["source"]["arms"][0]["updates"] == 20
    assert not Path("runs").exists()


def test_check_fails_with_1_and_says_why(transfuse: Run, write: Write) -> None:
    recipe = write({"target.args.classes": 4})
    done = transfuse("check", recipe)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "4 classes" in done.stderr
    told = transfuse("check", recipe, "--json")
    assert told.exit_code == 1
    assert json.loads(told.stdout)["ok"] is False
    assert "4 classes" in json.loads(told.stdout)["error"]


# Run, resume, report


def test_a_run_ends_with_the_verdict_and_the_files(transfuse: Run, write: Write) -> None:
    recipe = write({"name": "[red]name", "out": "runs/tiny"})
    done = transfuse("run", recipe)
    assert done.exit_code == 0, done.output
    assert "[red]name" in done.stdout
    assert json.loads(Path("runs/tiny/report.json").read_text())["verdict"] in done.stdout
    for file in ("report.html", "report.json", "model.safetensors"):
        assert f"runs/tiny/{file}" in done.stdout
        assert (Path("runs/tiny") / file).exists()
    assert "source, seed 0: done in" in done.stderr
    assert "KD(), seed 0: done in" in done.stderr
    assert "scratch, seed 0: done in" in done.stderr


def test_the_json_of_a_run_is_its_report(transfuse: Run, write: Write) -> None:
    done = transfuse("run", write(), "--json", "--out", "elsewhere", "--seed", 3, "--seed", 4)
    report = json.loads(done.stdout)
    assert report == json.loads(Path("elsewhere/report.json").read_text())
    assert [run["seed"] for run in report["arms"][0]["runs"]] == [3, 4]
    assert done.stderr == ""


def test_a_quiet_run_says_nothing(transfuse: Run, write: Write) -> None:
    done = transfuse("run", write(), "--quiet")
    assert (done.exit_code, done.output) == (0, "")


def test_a_run_can_be_asked_to_go_on_where_there_is_nothing_yet(transfuse: Run, write: Write) -> None:
    assert transfuse("run", write(), "--resume", "--quiet").exit_code == 0
    assert Path("runs/tiny/report.json").exists()


def test_a_finished_run_resumes_to_the_same_report(transfuse: Run, write: Write) -> None:
    first = json.loads(transfuse("run", write(), "--json").stdout)
    again = json.loads(transfuse("resume", "runs/tiny", "--json").stdout)
    assert first["arms"] == again["arms"]
    assert first["verdict"] == again["verdict"]


def test_an_existing_folder_is_refused_and_kept(transfuse: Run, write: Write) -> None:
    recipe = write()
    transfuse("run", recipe, "--quiet")
    before = Path("runs/tiny/report.json").read_bytes()
    done = transfuse("run", recipe)
    assert done.exit_code == 2
    assert "transfuse resume runs/tiny" in done.stderr
    assert Path("runs/tiny/report.json").read_bytes() == before


def test_report_shows_the_summary_again_and_draws_the_page_anew(transfuse: Run, write: Write) -> None:
    ran = transfuse("run", write())
    Path("runs/tiny/report.html").unlink()
    assert "Report:" not in transfuse("report", "runs/tiny", "--no-html").stdout
    shown = transfuse("report", "runs/tiny")
    assert shown.stdout == ran.stdout
    assert Path("runs/tiny/report.html").read_text().startswith("<!doctype html>")
    assert json.loads(transfuse("report", "runs/tiny", "--json").stdout)["name"] == "tiny"


def test_report_of_a_folder_without_one_says_how_to_finish(transfuse: Run, tmp_path: Path) -> None:
    done = transfuse("report", tmp_path)
    assert done.exit_code == 2
    assert "transfuse resume" in done.stderr
    assert transfuse("report", tmp_path / "nowhere").exit_code == 1


def test_resume_of_a_folder_without_a_run_is_refused(transfuse: Run, tmp_path: Path) -> None:
    done = transfuse("resume", tmp_path)
    assert done.exit_code == 2
    assert "nothing to resume" in done.stderr


# Errors


def test_an_error_is_one_message_without_a_traceback(transfuse: Run, write: Write) -> None:
    done = transfuse("run", write({"trainin": {}}))
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "Error: tiny.yaml: trainin: unknown key; did you mean 'training' or 'track'?\n"


@pytest.mark.parametrize(("before", "environment"), [(["--debug"], {}), ([], {"TRANSFUSE_DEBUG": "1"})])
def test_debugging_shows_the_traceback(
    transfuse: Run, monkeypatch: pytest.MonkeyPatch, before: list[str], environment: dict[str, Any]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = transfuse(*before, "run", "nowhere.yaml")
    assert "there is no recipe" in str(done.exception)


def test_names_in_messages_are_no_markup(transfuse: Run) -> None:
    assert "[bold]nowhere.yaml" in transfuse("run", "[bold]nowhere.yaml").stderr

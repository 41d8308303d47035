from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from transfuse.core.errors import InputError, StoreError
from transfuse.report import Report

Content = dict[str, Any]


def test_what_was_written_is_read_again(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == report


def test_the_file_holds_the_keys_it_was_built_from(classification: Content, tmp_path: Path) -> None:
    Report.model_validate(classification).write(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content.pop("created") == "2026-11-21T21:30:00Z"
    content["machine"].pop("accelerator")
    assert content == {key: value for key, value in classification.items() if key != "created"}


def test_null_is_the_default_of_what_may_be_null(minimal: Content) -> None:
    report = Report.model_validate(minimal)
    assert report.gain is report.source is report.classes is report.disagreement is None
    assert report.arms[0].calibration is None
    assert report.warnings == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "where",
    [
        ("gain", "low"),
        ("arms", 0, "runs", 0, "metrics", "kl"),
        ("arms", 0, "runs", 0, "curve", 3, "terms", "kd", "gradient_norm"),
        ("recipe", "epochs"),
        ("machine", "clock"),
    ],
)
def test_a_number_that_is_not_finite_is_refused_with_its_place(
    classification: Content, where: tuple[str | int, ...], bad: float
) -> None:
    content = changed(classification, where, bad)
    with pytest.raises(ValidationError, match=f"{'.'.join(map(str, where))}.*\n.*finite number"):
        Report.model_validate(content)


def test_nan_in_a_file_is_refused_with_its_place(classification: Content, tmp_path: Path) -> None:
    content = changed(
        changed(classification, ("arms", 0, "value", "mean"), float("nan")), ("recipe", "x"), float("inf")
    )
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"arms\.0\.value\.mean: .*finite") as caught:
        Report.read(tmp_path / "report.json")
    assert "recipe.x" in str(caught.value)


def test_nan_slipped_in_after_construction_never_reaches_the_file(minimal: Content, tmp_path: Path) -> None:
    report = Report.model_validate(copy.deepcopy(minimal))
    report.arms[0].runs[0].metrics["kl"] = float("nan")
    with pytest.raises(InputError, match=r"arms\.0\.runs\.0\.metrics\.kl"):
        report.write(tmp_path / "report.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", [("colour",), ("arms", 0, "colour"), ("arms", 1, "runs", 0, "curve", 0, "colour")])
def test_an_unknown_key_is_refused_with_its_place(classification: Content, where: tuple[str | int, ...]) -> None:
    with pytest.raises(ValidationError, match=f"{'.'.join(map(str, where))}\n.*not permitted"):
        Report.model_validate(changed(classification, where, "red"))


def test_a_machine_may_say_more(minimal: Content) -> None:
    report = Report.model_validate(changed(minimal, ("machine", "threads"), 4))
    assert report.machine.model_dump()["threads"] == 4


def test_two_arms_of_one_name_are_refused(classification: Content) -> None:
    with pytest.raises(ValidationError, match="different names, found 'scratch'"):
        Report.model_validate(changed(classification, ("arms", 2, "name"), "scratch"))


def test_a_report_without_a_method_is_refused(classification: Content) -> None:
    with pytest.raises(ValidationError, match='exactly one arm must have the role "method"'):
        Report.model_validate(changed(classification, ("arms", 0, "role"), "baseline"))


def test_a_matrix_of_another_size_than_the_classes_is_refused(classification: Content) -> None:
    with pytest.raises(ValidationError, match="2 rows for 10 classes"):
        Report.model_validate(changed(classification, ("disagreement", "matrix"), [[1, 2], [3, 4]]))
    with pytest.raises(ValidationError, match="must be square"):
        Report.model_validate(changed(classification, ("disagreement", "matrix"), [[1, 2], [3]]))


def test_a_format_from_the_future_is_refused(minimal: Content, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(changed(minimal, ("format",), 2)))
    with pytest.raises(InputError, match=r"not a report of format 1(.|\n)*format: "):
        Report.read(tmp_path / "report.json")


def test_a_missing_or_cut_off_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"none\.json: No such file"):
        Report.read(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"format": 1, "na')
    with pytest.raises(StoreError, match=r"half\.json is not JSON"):
        Report.read(tmp_path / "half.json")


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    minimal: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StoreError, match=r"could not write .*report\.json: No space left"):
        Report.model_validate(minimal).write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_old_file(minimal: Content, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old" * 10_000)
    Report.model_validate(minimal).write(path)
    assert Report.read(path).name == "digits"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(minimal: Content, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"Check that .*/none exists"):
        Report.model_validate(minimal).write(tmp_path / "none" / "report.json")


def changed(content: Content, where: tuple[str | int, ...], value: object) -> Content:
    """A copy of `content` with another value at one place."""
    content = copy.deepcopy(content)
    part: Any = content
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    return content

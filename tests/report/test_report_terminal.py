from __future__ import annotations

import copy
import io
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from transfuse.report import Report, summary


def printed(report: Report, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=80, **options)
    console.print(summary(report))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_shows_every_arm_with_value_gain_agreement_and_seconds(classification: dict[str, Any]) -> None:
    lines = printed(Report.model_validate(classification)).splitlines()
    method = next(line for line in lines if line.strip().startswith("KD "))
    assert method.split() == ["KD", "0.9120", "+0.0214", "[+0.0153,", "+0.0275]", "0.9315", "81.9"]
    assert any(line.strip().startswith("shuffled teacher") and "-0.0035" in line for line in lines)
    assert any(line.split() == ["ResNet-18", "0.9487"] for line in lines)
    assert "arrived: KD beats" in "\n".join(lines)


def test_fits_80_columns_and_holds_no_colour_where_there_is_none(report: Report) -> None:
    text = printed(report)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert f"{report.verdict}: " in text


def test_colours_the_verdict_where_it_can(report: Report) -> None:
    assert "\x1b[1" in printed(report, force_terminal=True, color_system="standard")


def test_prints_to_an_ascii_pipe(report: Report) -> None:
    pipe = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=pipe, width=80).print(summary(report))
    pipe.flush()
    assert report.verdict.encode() in pipe.buffer.getvalue()  # type: ignore[attr-defined]


def test_leaves_out_columns_that_nobody_fills(minimal: dict[str, Any]) -> None:
    text = printed(Report.model_validate(minimal))
    assert "gain" not in text
    assert "agreement" not in text


def test_long_names_are_folded_and_numbers_never(classification: dict[str, Any]) -> None:
    content = copy.deepcopy(classification)
    content["arms"][0]["name"] = "knowledge distillation with a very long name, temperature 4, weight 0.9"
    text = printed(Report.model_validate(content))
    assert "+0.0214 [+0.0153, +0.0275]" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", ["[red]KD[/red]", "[/]", "[link=x]KD"])
def test_names_are_not_markup(minimal: dict[str, Any], name: str) -> None:
    content = copy.deepcopy(minimal)
    content["arms"][0]["name"] = content["name"] = content["why"] = name
    assert printed(Report.model_validate(content)).count(name) == 3


def test_importing_the_package_imports_nothing_that_draws() -> None:
    heavy = "{'plotly', 'jinja2', 'rich', 'yaml', 'torch'}"
    code = f"import sys, transfuse.report; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"

"""The report in a terminal: one table and one line of verdict. The page with pictures: `html.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transfuse.report.numbers import number, signed, signed_bounds

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from transfuse.report.schema import Gain, Report

STYLES = {
    "arrived": "bold green",
    "no effect": "bold yellow",
    "negative transfer": "bold red",
    "not compared": "bold",
}


def summary(report: Report) -> Group:
    """A renderable for `rich.console.Console.print`: arms and source, then the verdict and why.

    Fits 80 columns and needs no colour; columns without any value are left out.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = [
        [
            arm.name,
            "" if arm.value is None else number(arm.value.mean),
            _gain(arm.gain),
            _optional(arm.average("agreement")),
            f"{arm.seconds:.1f}",
        ]
        for arm in report.arms
    ]
    if report.source:
        source = report.source
        rows.append([source.name, _optional(source.value), "", _optional(source.metrics.get("agreement")), ""])

    headings = ["", report.metric, "gain", "agreement", "seconds"]
    table = Table(title=Text(report.name, "bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    kept = [i for i in range(len(headings)) if any(row[i] for row in rows)]
    for i in kept:
        # Only names may be folded: a number cut in two reads as another number.
        table.add_column(Text(headings[i]), justify="right" if i else "left", overflow="fold", no_wrap=i > 0)
    for row in rows:
        # Text, never str: a name such as "[red]" is a name, not markup.
        table.add_row(*(Text(row[i]) for i in kept))
    if report.task == "measure":
        return Group(*_measured(report), Text(report.why), *(Text(f"Note: {text}") for text in report.warnings))
    verdict = Text.assemble((report.verdict, STYLES[report.verdict]), ": ", report.why)
    said = dict.fromkeys([*report.warnings, *(text for run in report.method_arm.runs for text in run.warnings)])
    return Group(table, verdict, *(Text(f"Note: {text}") for text in said))


def _measured(report: Report) -> list[Table]:
    """What a measure found: its numbers, and its tables."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    numbers: dict[str, list[float | None]] = {n: [value] for n, value in report.method_arm.runs[0].metrics.items()}
    found = [("numbers", [""], numbers)] if numbers else []
    found += [
        (panel.title, panel.columns, dict(zip(panel.rows, panel.values, strict=True)))
        for panel in report.panels
        if panel.kind == "matrix"
    ]
    drawn = []
    for title, columns, rows in found:
        table = Table(title=Text(title, "bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for heading in ["", *columns]:
            table.add_column(Text(heading), justify="right" if heading in columns else "left", overflow="fold")
        for name, values in rows.items():
            table.add_row(Text(name), *(Text(_optional(value)) for value in values))
        drawn.append(table)
    return drawn


def _optional(value: float | None) -> str:
    return "" if value is None else number(value)


def _gain(gain: Gain | None) -> str:
    return "" if gain is None else f"{signed(gain.mean)} {signed_bounds(gain)}"

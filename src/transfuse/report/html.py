"""The page `report.html`: one file that shows a :class:`Report` and asks the network for nothing.

Lives here: what goes into the page. How it looks: `template.html.j2`. The plots: `pictures.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from transfuse.core.files import write_atomically
from transfuse.report import numbers
from transfuse.report.pictures import sections, styles
from transfuse.report.schema import Footprint, Report

# Headings of the usual metrics, in the order of their columns. Others follow under their own names.
HEADINGS = {
    "accuracy": "accuracy",
    "agreement": "agreement with source",
    "kl": "KL from source",
    "ece": "ECE",
    "nll": "NLL",
}


@dataclass(frozen=True)
class CostRow:
    """One cost of both ends, in words."""

    name: str
    source: str
    target: str
    ratio: str


def render(report: Report) -> str:
    """The whole page, plotly.js included, as text."""
    import yaml
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for written in (
        numbers.number,
        numbers.signed,
        numbers.bounds,
        numbers.signed_bounds,
        numbers.percent,
        numbers.duration,
    ):
        environment.filters[written.__name__] = written
    template = environment.from_string((files(__package__) / "template.html.j2").read_text(encoding="utf-8"))
    drawn = sections(report)
    return template.render(
        report=report,
        styles=styles(report),
        columns=metric_columns(report),
        sections=drawn,
        figures={p.id: {"data": p.data, "layout": p.layout} for pictures in drawn.values() for p in pictures},
        costs=cost_rows(report),
        run_warnings=[(arm.name, run.seed, text) for arm in report.arms for run in arm.runs for text in run.warnings],
        recipe=yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True),
        machine=report.machine.model_dump(exclude_none=True),
        plotlyjs=get_plotlyjs(),
    )


def write_html(report: Report, path: str | Path) -> None:
    """Save the page of `report`, atomically.

    Raises:
        StoreError: the file cannot be written.
    """
    write_atomically(path, render(report))


def metric_columns(report: Report) -> dict[str, str]:
    """Keys and headings of the metrics that any run or the source has, without the one that is judged by."""
    found = dict.fromkeys(key for arm in report.arms for run in arm.runs for key in run.metrics)
    found |= dict.fromkeys(report.source.metrics if report.source else ())
    known = {key: heading for key, heading in HEADINGS.items() if key in found}
    columns = known | {key: key for key in found if key not in HEADINGS}
    return {key: heading for key, heading in columns.items() if key != report.metric}


def cost_rows(report: Report) -> list[CostRow]:
    """The costs known of the target, next to the source's, and how many times the source's are as large."""

    cost = report.cost
    if cost is None:
        return []

    def row(name: str, field: str, unit: str) -> CostRow | None:
        source, target = _cost(cost.source, field), _cost(cost.target, field)
        if target is None:
            return None
        return CostRow(
            name,
            source="" if source is None else numbers.amount(source, unit),
            target=numbers.amount(target, unit),
            ratio="" if source is None or target == 0 else f"{source / target:.3g}x",
        )

    rows = [
        row("parameters", "parameters", ""),
        row("size", "bytes", "B"),
        row("operations per sample", "flops", "FLOP"),
        row("latency per sample", "latency_ms", "ms"),
    ]
    return [row for row in rows if row]


def _cost(footprint: Footprint | None, field: str) -> float | None:
    return None if footprint is None else getattr(footprint, field)

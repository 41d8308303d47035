"""The plots of `report.html`, as plain Plotly figures (dicts): one function per picture.

A function returns None when its data is null, and the page then has no place for it. Colours are mid-grey
where they are not an arm's, so that a picture reads on light and on dark paper; the page's style sheet
sharpens the text. Names are shown as typed: Plotly would read HTML in them, so they are escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from transfuse.report.panels import Bars, Images, Matrix, figure, image_axes
from transfuse.report.schema import Arm, CurvePoint, LossTerm, Report

Json = dict[str, Any]

# Paul Tol's "vibrant" scheme: told apart with any common colour blindness. Blue is the method's alone.
METHOD_COLOUR = "#0077BB"
COLOURS = ("#EE7733", "#009988", "#EE3377", "#33BBEE", "#CC3311", "#949494")
DASHES = ("8px,4px", "2px,3px", "8px,3px,2px,3px", "14px,4px", "14px,3px,2px,3px")
SYMBOLS = ("square", "diamond", "triangle-up", "triangle-down", "x", "cross", "star")
# Terms are no arms: other colours, so that nobody looks for a link.
TERM_COLOURS = ("#AA4499", "#44AA99", "#BBA033", "#CC6677", "#6699CC", "#999999")
WORSE = "#CC3311"
GREY = "#808890"
FAINT = "rgba(128,136,144,0.28)"
CLEAR = "rgba(0,0,0,0)"
ZERO_LINE: Json = {"zeroline": True, "zerolinecolor": GREY, "zerolinewidth": 2, "rangemode": "tozero"}

MAX_POINTS = 400  # drawn of one line
MAX_BARS = 40  # classes with a gain bar
MAX_CELLS = 30  # rows of the disagreement map


@dataclass(frozen=True)
class Style:
    """How one arm, or one term, looks wherever it is drawn. `dash` is written as in SVG and in Plotly."""

    colour: str
    dash: str = "solid"
    symbol: str = "circle"
    width: float = 2

    @property
    def line(self) -> Json:
        return {"color": self.colour, "dash": self.dash, "width": self.width}


@dataclass(frozen=True)
class Picture:
    """A Plotly figure and the words around it.

    The page writes the legend, (name, style) by line: Plotly's own takes its room from the plot.
    """

    id: str
    title: str
    caption: str
    data: list[Json]
    layout: Json
    legend: list[tuple[str, Style]] = field(default_factory=list)


def styles(report: Report) -> dict[str, Style]:
    """A style for each arm's name: the method's first and strongest, the others in their order."""
    others = [arm.name for arm in report.arms if arm is not report.method_arm]
    return {report.method_arm.name: Style(METHOD_COLOUR, width=3)} | {
        name: Style(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], SYMBOLS[i % len(SYMBOLS)])
        for i, name in enumerate(others)
    }


def sections(report: Report) -> dict[str, list[Picture]]:
    """All pictures that the report has data for, under their headings, in reading order."""
    planned: dict[str, Sequence[Picture | None]] = {
        "Learning curves": [metric_curves(report), loss_curves(report)],
        "Gain": [arm_gains(report), class_gains(report)],
        "Confidence and disagreement": [calibration(report), disagreement(report)],
        "Sets, stages and findings": [_panel(report, i) for i in range(len(report.panels))],
        "Loss terms of the method": [loss_terms(report), gradient_norms(report)],
    }
    drawn = {title: [p for p in pictures if p is not None] for title, pictures in planned.items()}
    return {title: pictures for title, pictures in drawn.items() if pictures}


def metric_curves(report: Report) -> Picture | None:
    """The validation metric of every arm over the updates."""
    data = list(_curves(report, lambda point: point.validation))
    if not data:
        return None
    better = "higher" if report.higher_is_better else "lower"
    return Picture(
        "metric-curves",
        f"{report.metric} on validation data",
        f"Each arm's mean over seeds; thin lines are single seeds. {better.capitalize()} is better. "
        "Look whether the method leads at the end, not only on the way.",
        data,
        _layout(340, xaxis=_axis("update"), yaxis=_axis(report.metric)),
        _arm_legend(report, data),
    )


def loss_curves(report: Report) -> Picture | None:
    """The training loss of every arm over the updates."""
    data = list(_curves(report, lambda point: point.loss))
    if not data:
        return None
    return Picture(
        "loss-curves",
        "training loss",
        "Arms minimise different losses, so compare shapes, not heights: a line still falling at its end "
        "was stopped early. Of long runs, evenly spaced points are drawn.",
        data,
        _layout(340, xaxis=_axis("update"), yaxis=_axis("loss")),
        _arm_legend(report, data),
    )


def arm_gains(report: Report) -> Picture | None:
    """Every arm's gain with its interval."""
    gains = [(arm, arm.gain) for arm in report.arms if arm.gain]
    if not gains:
        return None
    looks = styles(report)
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": _label(arm.name),
            "x": [gain.mean],
            "y": [i],
            "error_x": _error([gain.mean], [gain.low], [gain.high], looks[arm.name].colour, 2.5),
            "marker": {"color": looks[arm.name].colour, "symbol": looks[arm.name].symbol, "size": 13},
            "customdata": [[gain.low, gain.high]],
            "hovertemplate": "%{x:+.4f}<br>[%{customdata[0]:+.4f}, %{customdata[1]:+.4f}]",
        }
        for i, (arm, gain) in enumerate(gains)
    ]
    names = [f"{_label(arm.name, 18)}<br>against {_label(gain.against, 18)}" for arm, gain in gains]
    return Picture(
        "arm-gains",
        f"gain in {report.metric}",
        "Right of the zero line is better than the arm named second. An interval that crosses zero shows "
        "no effect; a control should sit on the line.",
        data,
        _layout(114 + 58 * len(gains), xaxis=_axis("gain", **ZERO_LINE), yaxis=_names_axis(names)),
    )


def class_gains(report: Report) -> Picture | None:
    """The method's gain on each class, best first; of many classes, both ends."""
    gains = sorted(report.per_class_gain or [], key=lambda entry: entry.gain, reverse=True)
    if not gains:
        return None
    note = ""
    if len(gains) > MAX_BARS:
        note = f" Of {len(gains)} classes, the {MAX_BARS // 2} best and the {MAX_BARS // 2} worst are drawn."
        gains = gains[: MAX_BARS // 2] + gains[-MAX_BARS // 2 :]
    means = [entry.gain for entry in gains]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "x": means,
            "y": list(range(len(gains))),
            "error_x": _error(means, [e.low for e in gains], [e.high for e in gains], GREY, 1.5),
            "marker": {"color": [METHOD_COLOUR if mean >= 0 else WORSE for mean in means], "opacity": 0.85},
            "customdata": [[entry.low, entry.high, entry.count] for entry in gains],
            "hovertemplate": "%{y}: %{x:+.4f}<br>[%{customdata[0]:+.4f}, %{customdata[1]:+.4f}]"
            "<br>%{customdata[2]} samples<extra></extra>",
        }
    ]
    return Picture(
        "class-gains",
        "gain per class",
        "Who won and who paid: bars to the left are classes that the method made worse. "
        f"An interval that crosses zero may be chance.{note}",
        data,
        _layout(
            108 + 26 * len(gains),
            xaxis=_axis("gain", **ZERO_LINE),
            yaxis=_names_axis([_label(entry.name, 24) for entry in gains]),
            bargap=0.35,
        ),
    )


def calibration(report: Report) -> Picture | None:
    """Reliability curve of every arm over the number of samples in each bin."""
    curves = [(arm, arm.calibration) for arm in report.arms if arm.calibration]
    if not curves:
        return None
    looks = styles(report)
    data: list[Json] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [0, 1],
            "y": [0, 1],
            "line": {"color": GREY, "dash": "dot", "width": 1.5},
            "hoverinfo": "skip",
        }
    ]
    for i, (arm, curve) in enumerate(curves):
        look = looks[arm.name]
        bar = 0.8 / len(curve.count) / len(curves)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": _label(arm.name),
                "x": curve.confidence,
                "y": curve.accuracy,
                "line": look.line,
                "marker": {"symbol": look.symbol, "size": 8},
                "hovertemplate": "confidence %{x:.3f}<br>accuracy %{y:.3f}",
            }
        )
        data.append(
            {
                "type": "bar",
                "name": _label(arm.name),
                "x": curve.confidence,
                "y": curve.count,
                "width": bar,
                "offset": bar * (i - len(curves) / 2),
                "yaxis": "y2",
                "marker": {"color": look.colour, "opacity": 0.85},
                "hovertemplate": "%{y} samples",
            }
        )
    return Picture(
        "calibration",
        "calibration",
        "On the diagonal an arm is right as often as it says; below it, it is too sure of itself, above it "
        "too modest. The bars count the samples behind each point: trust tall ones.",
        data,
        _layout(
            420,
            xaxis=_axis("confidence", range=[0, 1.02], anchor="y2"),
            yaxis=_axis("accuracy", range=[0, 1.02], domain=[0.32, 1]),
            yaxis2=_axis("samples", domain=[0, 0.22], nticks=3),
        ),
        _arm_legend(report, data),
    )


def disagreement(report: Report) -> Picture | None:
    """Where the method's target says something else than the source."""
    if not report.disagreement or not report.disagreement.matrix:
        return None
    matrix = report.disagreement.matrix
    names = report.classes or [str(i) for i in range(len(matrix))]
    apart = [sum(row) + sum(r[i] for r in matrix) - 2 * row[i] for i, row in enumerate(matrix)]
    shown = sorted(sorted(range(len(matrix)), key=lambda i: -apart[i])[:MAX_CELLS])
    note = ""
    if len(shown) < len(matrix):
        note = f" The {len(shown)} classes of {len(matrix)} with most of it are drawn."
    total = sum(map(sum, matrix))
    differ = sum(apart) // 2
    cells = [[None if row == column else matrix[row][column] for column in shown] for row in shown]
    labels = [_label(names[i], 16) for i in shown]
    data = [
        {
            "type": "heatmap",
            "z": cells,
            "colorscale": [[0, METHOD_COLOUR + "00"], [1, METHOD_COLOUR + "C0"]],
            "zmin": 0,
            "xgap": 1,
            "ygap": 1,
            "showscale": False,
            "hoverongaps": False,
            "texttemplate": "%{z}" if len(shown) <= 15 else "",
            "hovertemplate": "%{z} samples: source %{y}, target %{x}<extra></extra>",
        }
    ]
    return Picture(
        "disagreement",
        "where target and source disagree",
        f"They differ on {differ:,} of {total:,} samples. Rows: what the source says; columns: what the "
        f"target says instead. The diagonal, where they agree, is left empty.{note}",
        data,
        _layout(
            128 + max(22, min(34, 340 // len(shown))) * len(shown),
            xaxis=_names_axis(labels, title="target says", tickangle=-45 if len(shown) > 4 else 0),
            yaxis=_names_axis(labels, title="source says"),
        ),
    )


def _panel(report: Report, number: int) -> Picture:
    """What the family shows, see :mod:`transfuse.report.panels`."""
    panel, looks = report.panels[number], styles(report)
    data, height = figure(panel, {name: look.colour for name, look in looks.items()}, TERM_COLOURS)
    axes: Json = {"xaxis": _axis(panel.x), "yaxis": _axis(panel.y)}
    if isinstance(panel, Matrix):
        names = [[_label(name, 18) for name in side] for side in (panel.columns, panel.rows)]
        axes["xaxis"] = _names_axis(names[0], title=panel.x, tickangle=-45 if len(names[0]) > 6 else 0)
        axes["yaxis"] = _names_axis(names[1], title=panel.y)
    elif isinstance(panel, Bars):
        groups = [_label(name, 18) for name in panel.groups]
        axes["xaxis"] = _names_axis(groups, title=panel.x, tickangle=-45 if len(groups) > 6 else 0)
    elif isinstance(panel, Images):
        axes = image_axes(panel)
    named = [trace for trace in data if "name" in trace]
    legend = [(trace["name"], Style(trace["marker"]["color"], width=4)) for trace in named]
    for trace in named:
        trace["name"] = _label(trace["name"])
    return Picture(f"panel-{number}", panel.title, panel.note, data, _layout(height, **axes), legend)


def loss_terms(report: Report) -> Picture | None:
    """Every term of the method's loss, raw and weighted."""
    weighted = _term_lines(report, lambda term: term.weighted, Style("", width=2.5))
    raw = _term_lines(report, lambda term: term.raw, Style("", dash="2px,3px", width=1.5))
    if not weighted:
        return None
    data = [*weighted.values(), *raw.values()]
    return Picture(
        "loss-terms",
        "loss terms, raw and weighted",
        "Solid: what a term adds to the loss; dotted: before its weight. A solid line far below the others "
        "barely steers the training; one that stays flat is not learned.",
        data,
        _layout(360, xaxis=_axis("update"), yaxis=_positive_axis("loss term", data)),
        list(weighted),
    )


def gradient_norms(report: Report) -> Picture | None:
    """How hard each term pulls at the target."""
    lines = _term_lines(report, lambda term: term.gradient_norm, Style("", width=2.5))
    if not lines:
        return None
    data = list(lines.values())
    return Picture(
        "gradient-norms",
        "gradient norm of each term",
        "How hard each weighted term pulls at the parameters. A term a hundred times below the others teaches nothing.",
        data,
        _layout(360, xaxis=_axis("update"), yaxis=_positive_axis("gradient norm", data)),
        list(lines),
    )


def _curves(report: Report, pick: Callable[[CurvePoint], float | None]) -> Iterator[Json]:
    """Per arm: a thin line for each seed and a strong one for their mean."""
    looks = styles(report)
    for arm in reversed(report.arms):  # the first arm is drawn last, on top
        look = looks[arm.name]
        lines = _lines(arm, pick)
        if len(lines) > 1:
            for line in lines:
                yield {
                    **_line(line),
                    "opacity": 0.4,
                    "hoverinfo": "skip",
                    "line": {"color": look.colour, "width": 1},
                }
        if lines:
            yield {
                **_line(_mean(lines)),
                "name": _label(arm.name),
                "line": look.line,
                "hovertemplate": "%{y:.4f}",
            }


def _arm_legend(report: Report, data: Sequence[Json]) -> list[tuple[str, Style]]:
    """The arms that have a trace in `data`, in the report's order."""
    drawn = {trace.get("name") for trace in data}
    return [(name, look) for name, look in styles(report).items() if _label(name) in drawn]


def _term_lines(report: Report, pick: Callable[[LossTerm], float | None], look: Style) -> dict[tuple[str, Style], Json]:
    """By legend entry, the mean over seeds of each term of the method's loss, in its colour."""
    arm = report.method_arm
    names = dict.fromkeys(name for run in arm.runs for point in run.curve for name in point.terms)
    found = {}
    for i, name in enumerate(names):

        def value(point: CurvePoint, name: str = name) -> float | None:
            return pick(point.terms[name]) if name in point.terms else None

        if lines := _lines(arm, value):
            own = replace(look, colour=TERM_COLOURS[i % len(TERM_COLOURS)])
            found[name, own] = {
                **_line(_mean(lines)),
                "name": _label(name),
                "line": own.line,
                "hovertemplate": "%{y:.4g}",
            }
    return found


def _lines(arm: Arm, pick: Callable[[CurvePoint], float | None]) -> list[dict[int, float]]:
    """Per run the picked values by step, without runs that have none."""
    lines = [{p.step: value for p in run.curve if (value := pick(p)) is not None} for run in arm.runs]
    return [line for line in lines if line]


def _mean(lines: Sequence[dict[int, float]]) -> dict[int, float]:
    """Mean over seeds at the steps that all of them have: a seed that ends early must not bend the line."""
    shared = set(lines[0]).intersection(*lines)
    return {step: fmean(line[step] for line in lines) for step in shared}


def _line(values: dict[int, float]) -> Json:
    """A trace through `values`; long ones are thinned evenly from the end, so that the last point stays."""
    stride = max(1, math.ceil(len(values) / MAX_POINTS))
    steps = sorted(values)[::-1][::stride][::-1]
    mode = "lines+markers" if len(steps) == 1 else "lines"
    return {"type": "scatter", "mode": mode, "x": steps, "y": [values[step] for step in steps]}


def _label(name: str, length: int = 60) -> str:
    """A name as Plotly shall print it: cut to `length`, its markup inert."""
    return html.escape(name if len(name) <= length else name[: length - 1] + "…", quote=False)


def _error(means: Sequence[float], lows: Sequence[float], highs: Sequence[float], colour: str, width: float) -> Json:
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - mean for high, mean in zip(highs, means, strict=True)],
        "arrayminus": [mean - low for low, mean in zip(lows, means, strict=True)],
        "color": colour,
        "thickness": width,
        "width": 5,
    }


def _axis(title: str, **more: Any) -> Json:
    return {
        "title": {"text": _label(title), "standoff": 10, "font": {"size": 13}},
        "gridcolor": FAINT,
        "linecolor": FAINT,
        "zeroline": False,
        "automargin": True,
        **more,
    }


def _names_axis(names: Sequence[str], title: str = "", **more: Any) -> Json:
    """Names at 0, 1, ... from the top. Not categories: two names may be equal, or look like a date."""
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": list(names)}
    edge = len(names) - 0.5
    across = "tickangle" in more
    return _axis(title, **ticks, showgrid=False, range=[-0.5, edge] if across else [edge, -0.5], **more)


def _positive_axis(title: str, data: Iterable[Json]) -> Json:
    """Logarithmic when every value allows it."""
    values = [y for line in data for y in line["y"]]
    if min(values, default=0) <= 0:
        return _axis(title)
    # Ticks at 1, 2, 5 over a few decades, at powers of ten over many.
    return _axis(title, type="log", tickformat="~g", dtick="D2" if max(values) < 1000 * min(values) else 1)


def _layout(height: int, **more: Any) -> Json:
    return {
        "height": height,
        "margin": {"l": 12, "r": 14, "t": 30, "b": 12},  # the top holds the tool bar, off the data
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "font": {
            "family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
            "size": 13,
            "color": GREY,
        },
        "hovermode": "closest",
        "hoverlabel": {"namelength": -1},
        "showlegend": False,
        **more,
    }

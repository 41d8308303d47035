"""What a family shows besides the usual pictures: matrices, bars, lines, points and images, each with its numbers.

Lives here: their shapes, which stand in `report.json`, and how they are drawn. What is put into them comes from
the comparison (sets, stages), from a method (`Method.panels`) or from a measure.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Number = float | None


class PanelPart(BaseModel):
    """Fields that all panels have. `note` says how to read it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    title: str
    note: str = ""
    x: str = ""
    y: str = ""


class Matrix(PanelPart):
    """A table of numbers as a map, `(rows, columns)`: tasks after each stage, coefficients, similarities."""

    kind: Literal["matrix"] = "matrix"
    rows: list[str] = Field(min_length=1)
    columns: list[str] = Field(min_length=1)
    values: list[list[Number]]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.values) != len(self.rows) or any(len(row) != len(self.columns) for row in self.values):
            raise ValueError(f"{self.title}: values must be {len(self.rows)} rows of {len(self.columns)} numbers")
        return self


class Bars(PanelPart):
    """One bar for each row (an arm) in each group (a client, a set)."""

    kind: Literal["bars"] = "bars"
    rows: list[str] = Field(min_length=1)
    groups: list[str] = Field(min_length=1)
    values: list[list[Number]]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.values) != len(self.rows) or any(len(row) != len(self.groups) for row in self.values):
            raise ValueError(f"{self.title}: values must be {len(self.rows)} rows of {len(self.groups)} numbers")
        return self


class Lines(PanelPart):
    """Curves by name, each a list of (x, y)."""

    kind: Literal["lines"] = "lines"
    series: dict[str, list[tuple[float, Number]]] = Field(min_length=1)


class Points(PanelPart):
    """Clouds of points by name, each a list of (x, y): embeddings."""

    kind: Literal["points"] = "points"
    series: dict[str, list[tuple[float, float]]] = Field(min_length=1)


class Picture(BaseModel):
    """An image as rows of numbers; larger is stronger."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    title: str
    pixels: list[list[float]]


class Images(PanelPart):
    """Images side by side: saliency maps, generated samples."""

    kind: Literal["images"] = "images"
    images: list[Picture] = Field(min_length=1)


Panel = Annotated[Matrix | Bars | Lines | Points | Images, Field(discriminator="kind")]


def figure(panel: Panel, colours: dict[str, str], palette: tuple[str, ...]) -> tuple[list[dict[str, Any]], int]:
    """Plotly traces and the height in pixels.

    Args:
        colours: of names that have one elsewhere on the page, the arms.
        palette: for other names.
    """
    if isinstance(panel, Matrix):
        return [_map(panel)], 150 + max(26, min(44, 420 // len(panel.rows))) * len(panel.rows)
    if isinstance(panel, Images):
        return [_image(i, picture.pixels) for i, picture in enumerate(panel.images)], 40 + 190 * _rows(panel)
    names = panel.rows if isinstance(panel, Bars) else list(panel.series)
    look = {name: colours.get(name, palette[i % len(palette)]) for i, name in enumerate(names)}
    if isinstance(panel, Bars):
        return [
            {
                "type": "bar",
                "name": name,
                "x": list(range(len(panel.groups))),
                "y": row,
                "marker": {"color": look[name]},
            }
            for name, row in zip(panel.rows, panel.values, strict=True)
        ], 340
    mode = "lines+markers" if isinstance(panel, Lines) else "markers"
    return [
        {
            "type": "scatter",
            "mode": mode,
            "name": name,
            "x": [x for x, _ in points],
            "y": [y for _, y in points],
            "line": {"color": look[name], "width": 2},
            "marker": {"color": look[name], "size": 6, "opacity": 0.75},
        }
        for name, points in panel.series.items()
    ], 360 if isinstance(panel, Lines) else 440


COLUMNS = 4
"""Images in a row."""


def _rows(panel: Images) -> int:
    return -(-len(panel.images) // COLUMNS)


def _map(panel: Matrix) -> dict[str, Any]:
    small = len(panel.rows) * len(panel.columns) <= 144
    return {
        "type": "heatmap",
        "z": panel.values,
        "colorscale": [[0, "#0077BB00"], [1, "#0077BBC0"]],
        "xgap": 1,
        "ygap": 1,
        "showscale": not small,
        "hoverongaps": False,
        "texttemplate": "%{z:.3~g}" if small else "",
        "hovertemplate": "%{y}, %{x}: %{z:.4g}<extra></extra>",
    }


def _image(number: int, pixels: list[list[float]]) -> dict[str, Any]:
    axis = "" if number == 0 else str(number + 1)
    return {
        "type": "heatmap",
        "z": pixels,
        "colorscale": "Viridis",
        "showscale": False,
        "hovertemplate": "%{z:.3g}<extra></extra>",
        "xaxis": f"x{axis}",
        "yaxis": f"y{axis}",
    }


def image_axes(panel: Images) -> dict[str, Any]:
    """A place of its own for every image, upright and without ticks, its title above it."""
    rows, layout, notes = _rows(panel), {}, []
    for i, picture in enumerate(panel.images):
        axis, row, column = "" if i == 0 else str(i + 1), i // COLUMNS, i % COLUMNS
        left, top = column / COLUMNS, 1 - row / rows
        bare = {"showticklabels": False, "showgrid": False, "zeroline": False}
        layout[f"xaxis{axis}"] = {"domain": [left + 0.01, left + 1 / COLUMNS - 0.01], "anchor": f"y{axis}", **bare}
        layout[f"yaxis{axis}"] = {
            "domain": [top - 1 / rows, top - 0.16 / rows],
            "anchor": f"x{axis}",
            "autorange": "reversed",
            "scaleanchor": f"x{axis}",
            **bare,
        }
        middle = left + 0.5 / COLUMNS
        text = {"text": picture.title, "x": middle, "y": top - 0.15 / rows, "xanchor": "center", "yanchor": "bottom"}
        notes.append({**text, "xref": "paper", "yref": "paper", "showarrow": False, "font": {"size": 12}})
    return {**layout, "annotations": notes}

"""Panels: what a family shows, with its numbers in the report."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from transfuse.report import Report
from transfuse.report.html import render
from transfuse.report.panels import Panel

PANEL = TypeAdapter(Panel)
PANELS: list[dict[str, Any]] = [
    {"kind": "matrix", "title": "result matrix", "rows": ["after 1"], "columns": ["a", "b"], "values": [[0.5, None]]},
    {"kind": "bars", "title": "by client", "rows": ["<b>KD</b>"], "groups": ["0", "1"], "values": [[0.5, 0.7]]},
    {"kind": "lines", "title": "from stage to stage", "series": {"KD": [[1, 0.5], [2, None]]}},
    {"kind": "points", "title": "domains", "series": {"source": [[0.0, 1.0]], "target": [[1.0, 0.0]]}},
    {"kind": "images", "title": "maps", "images": [{"title": str(i), "pixels": [[0.0, 1.0]]} for i in range(6)]},
]


@pytest.mark.parametrize("content", PANELS, ids=lambda c: c["kind"])
def test_a_panel_is_read_again_as_it_was_written(content: dict[str, Any]) -> None:
    panel = PANEL.validate_python(content)
    assert PANEL.validate_json(PANEL.dump_json(panel)) == panel


def test_every_kind_is_drawn_under_its_title(classification: dict[str, Any]) -> None:
    page = render(Report.model_validate({**classification, "panels": PANELS}))
    for content in PANELS:
        assert content["title"] in page
    assert "<b>KD</b>" not in page, "a name is a name, not markup"


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "matrix", "title": "t", "rows": ["a"], "columns": ["b"], "values": [[1.0, 2.0]]},
        {"kind": "bars", "title": "t", "rows": ["a"], "groups": ["b"], "values": []},
        {"kind": "matrix", "title": "t", "rows": ["a"], "columns": ["b"], "values": [[float("nan")]]},
        {"kind": "pie", "title": "t"},
        {"kind": "lines", "title": "t", "series": {}},
    ],
)
def test_a_panel_that_does_not_fit_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PANEL.validate_python(wrong)

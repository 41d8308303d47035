"""The report of a transfer: `report.json` as typed models, and what is drawn from it.

Lives here: the shape of the file (:mod:`~transfuse.report.schema`), the page `report.html`
(:mod:`~transfuse.report.html`, its plots in :mod:`~transfuse.report.pictures`) and the table that ends
a run in a terminal (:mod:`~transfuse.report.terminal`).
Does not live here: measuring, comparing and judging. Whoever fills a :class:`Report` does that.
"""

from transfuse.report.html import render, write_html
from transfuse.report.schema import Report
from transfuse.report.terminal import summary

__all__ = ["Report", "render", "summary", "write_html"]

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from transfuse.core.errors import StoreError
from transfuse.report import Report, render, write_html
from transfuse.report.html import cost_rows, metric_columns
from transfuse.report.numbers import amount, duration, number, signed
from transfuse.report.pictures import MAX_BARS, MAX_CELLS, MAX_POINTS, sections, styles

Content = dict[str, Any]

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '<a href="javascript:window.hacked = 1">a</a>',
    "<b>bold</b><br>&lt;",
    '"><svg onload=window.hacked=1>',
    "{{ 7 * 7 }} %{x} $x$",
    "<!-- <script>",
    "2026-11-21",
    "7",
]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, started once."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def shown(browser: Any, tmp_path: Path) -> Iterator[Callable[[Report], Any]]:
    """Open a report's page. After the test: it asked for nothing but itself and had no errors."""
    path = tmp_path / "report.html"
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on(
        "console",
        lambda message: errors.append(message.text) if message.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: errors.append(str(error)))

    def show(report: Report) -> Any:
        write_html(report, path)
        page.goto(path.as_uri())
        return page

    yield show
    page.close()
    assert requests == [path.as_uri()]
    assert errors == []


def test_every_plot_is_drawn_legible_and_fits_the_window(
    shown: Callable[[Report], Any], report: Report, tmp_path: Path
) -> None:
    page = shown(report)
    expected = [picture.id for pictures in sections(report).values() for picture in pictures]
    for width, scheme in ((1280, "light"), (400, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(200)  # Plotly waits that long before it follows the window, and longer on a busy machine
        page.wait_for_function(
            """() => [...document.querySelectorAll(".plot")].every((plot) =>
              Math.abs(plot.querySelector("svg.main-svg").clientWidth - plot.clientWidth) < 2)"""
        )
        plots = page.evaluate(
            """() => [...document.querySelectorAll(".plot")].map((plot) => {
              const box = plot.querySelector("svg.main-svg").getBoundingClientRect();
              const drawn = ".scatterlayer .trace, .barlayer .trace, .heatmaplayer image";
              const traces = [...plot.querySelectorAll(drawn)];
              return {
                id: plot.id, width: box.width, height: box.height, right: box.right,
                traces: traces.filter((trace) => trace.getBoundingClientRect().width > 0).length,
                text: getComputedStyle(plot.querySelector(".xtick text")).fill,
                paper: getComputedStyle(plot.closest("figure")).backgroundColor,
              };
            })"""
        )
        assert [plot["id"] for plot in plots] == expected
        for plot in plots:
            assert plot["width"] > 250
            assert plot["height"] > 100
            assert plot["right"] <= width
            assert plot["traces"] > 0
            assert contrast(plot["text"], plot["paper"]) > 7
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=tmp_path / "report.png", full_page=True)


def test_hostile_names_are_inert_and_shown_as_typed(shown: Callable[[Report], Any], classification: Content) -> None:
    page = shown(Report.model_validate(hostile(classification)))
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('.plot a, img, svg[onload]').length") == 0
    assert page.inner_text("h1") == HOSTILE[0]
    assert HOSTILE[3] in page.inner_text("table")
    ticks = page.locator("#class-gains .ytick text").all_text_contents()
    assert sorted(ticks) == sorted(name if len(name) <= 24 else name[:23] + "…" for name in HOSTILE)
    page.locator("#class-gains .bars .point").first.hover(force=True)  # Plotly hears the mouse on a layer above
    hovered = page.locator("#class-gains .hoverlayer text").first
    assert hovered.text_content().startswith(f"{ticks[0]}: +")


def test_hostile_names_stay_text_in_the_source_of_the_page(classification: Content) -> None:
    page = render(Report.model_validate(hostile(classification)))
    harmless = render(Report.model_validate(classification | {"metric": "score"}))
    assert tags(page) == tags(harmless)
    figures = re.search(r'<script id="figures" type="application/json">(.*)</script>', page)
    assert figures
    assert "<" not in figures[1]
    assert "<br>" in json.dumps(json.loads(figures[1]))


def test_holds_plotly_once_and_loads_nothing(report: Report) -> None:
    page = render(report)
    parsed = tags(page)
    assert parsed["script"] == 3
    assert page.count("plotly.js v") == 1
    assert not re.search(r"<(script|img|link|iframe)[^>]+(src|href)=[\"'](?!data:)", page)
    assert "default-src 'none'" in page


def test_is_smaller_than_6_mb_even_when_the_report_is_large(classification: Content) -> None:
    assert len(render(large(classification)).encode()) < 6_000_000


def test_a_large_report_is_cut_to_what_can_be_seen(classification: Content) -> None:
    pictures = {p.id: p for part in sections(large(classification)).values() for p in part}
    assert len(pictures["class-gains"].data[0]["x"]) == MAX_BARS
    assert "Of 200 classes" in pictures["class-gains"].caption
    assert len(pictures["disagreement"].data[0]["z"]) == MAX_CELLS
    assert f"The {MAX_CELLS} classes of 200" in pictures["disagreement"].caption
    line = pictures["loss-curves"].data[-1]
    assert MAX_POINTS / 2 < len(line["x"]) <= MAX_POINTS
    assert line["x"][-1] == 1500


def test_has_the_facts_in_the_agreed_order(classification: Content) -> None:
    page = render(Report.model_validate(classification))
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Arms",
        "Learning curves",
        "Gain",
        "Confidence and disagreement",
        "Loss terms of the method",
        "Cost",
        "Warnings",
        "How to repeat it",
    ]
    for fact in (
        "+0.0214",
        "[+0.0153, +0.0275]",
        "seed 2, 600 updates",
        "10.3x",
        "temperature: 4.0",
        "2e6ee64",
    ):
        assert fact in page


def test_leaves_out_what_is_null(minimal: Content, language_model: Content) -> None:
    page = render(Report.model_validate(minimal))
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Arms", "Cost", "How to repeat it"]
    assert "<figure" not in page
    pictures = [p.id for part in sections(Report.model_validate(language_model)).values() for p in part]
    assert pictures == ["metric-curves", "loss-curves", "arm-gains", "loss-terms", "gradient-norms"]


def test_every_figure_says_what_to_read_off_it(classification: Content) -> None:
    page = render(Report.model_validate(classification))
    figure = r'<figure aria-label="[^"]+">\s*<figcaption><strong>.+?</strong>.{60,}?</figcaption>'
    figures = re.findall(figure, page)
    assert len(figures) == page.count("<figure") == 8
    assert len(re.findall(r'class="plot" id="[^"]+" role="img" aria-label="[^"]{60,}"', page)) == 8


def test_an_arm_looks_the_same_everywhere_and_no_two_alike(classification: Content) -> None:
    report = Report.model_validate(classification)
    looks = styles(report)
    assert len({look.colour for look in looks.values()}) == len(looks)
    assert looks["KD"].width > max(looks["scratch"].width, looks["shuffled teacher"].width)
    content = copy.deepcopy(classification)
    content["arms"] += [{**content["arms"][1], "name": f"baseline {i}"} for i in range(12)]
    many = list(styles(Report.model_validate(content)).values())
    assert many[0].colour not in {look.colour for look in many[1:]}
    assert len(set(many)) == len(many)
    for picture in (p for part in sections(report).values() for p in part):
        for trace in picture.data:
            if trace.get("name") in looks:
                assert looks[trace["name"]].colour in (
                    trace.get("line", {}).get("color"),
                    trace.get("marker", {}).get("color"),
                )


def test_the_strong_line_is_the_mean_over_seeds_where_all_have_a_value(minimal: Content) -> None:
    content = copy.deepcopy(minimal)
    content["arms"][0]["runs"] = [run(0, {10: 1.0, 20: 2.0, 30: 3.0}), run(1, {10: 3.0, 20: 6.0})]
    first, second, mean = sections(Report.model_validate(content))["Learning curves"][0].data
    assert (first["x"], first["y"]) == ([10, 20, 30], [1.0, 2.0, 3.0])
    assert second["x"] == [10, 20]
    assert (mean["x"], mean["y"]) == ([10, 20], [2.0, 4.0])


def test_seeds_without_a_common_step_keep_their_own_lines(minimal: Content) -> None:
    content = copy.deepcopy(minimal)
    content["arms"][0]["runs"] = [run(0, {10: 1.0}), run(1, {15: 3.0})]
    for one in content["arms"][0]["runs"]:
        one["curve"][0]["terms"] = {"kd": {"raw": 1.0, "weighted": 1.0}}
    lines = sections(Report.model_validate(content))["Learning curves"][0].data
    assert [line["y"] for line in lines] == [[1.0], [3.0], []]
    assert render(Report.model_validate(content))


def test_loss_terms_are_logarithmic_only_when_positive(classification: Content) -> None:
    content = copy.deepcopy(classification)
    terms = sections(Report.model_validate(content))["Loss terms of the method"][0]
    assert terms.layout["yaxis"]["type"] == "log"
    content["arms"][0]["runs"][0]["curve"][0]["terms"]["kd"]["raw"] = -100.0
    terms = sections(Report.model_validate(content))["Loss terms of the method"][0]
    assert "type" not in terms.layout["yaxis"]


def test_disagreement_counts_what_is_off_the_diagonal(classification: Content) -> None:
    content = copy.deepcopy(classification)
    content["classes"], content["disagreement"] = ["a", "b"], {"matrix": [[90, 3], [7, 1000]]}
    picture = sections(Report.model_validate(content))["Confidence and disagreement"][1]
    assert "10 of 1,100 samples" in picture.caption
    assert picture.data[0]["z"] == [[None, 3], [7, None]]


def test_columns_are_the_metrics_that_were_measured(classification: Content, minimal: Content) -> None:
    content = copy.deepcopy(classification)
    content["arms"][0]["runs"][1]["metrics"]["f1"] = 0.5
    assert list(metric_columns(Report.model_validate(content))) == ["agreement", "kl", "ece", "nll", "f1"]
    assert metric_columns(Report.model_validate(minimal)) == {}


def test_costs_are_compared_where_both_are_known(classification: Content, minimal: Content) -> None:
    rows = {row.name: row for row in cost_rows(Report.model_validate(classification))}
    assert (rows["size"].source, rows["size"].target, rows["size"].ratio) == ("44.7 MB", "4.33 MB", "10.3x")
    rows = {row.name: row for row in cost_rows(Report.model_validate(minimal))}
    assert list(rows) == ["parameters", "size", "latency per sample"]
    assert rows["size"].ratio == ""


def test_numbers_are_written_for_people() -> None:
    assert [number(x) for x in (0.91234, -0.5, 12.345, 123456.7)] == ["0.9123", "-0.5000", "12.35", "123,457"]
    assert [signed(x) for x in (0.02, 0.0, -0.02)] == ["+0.0200", "+0.0000", "-0.0200"]
    assert [duration(x) for x in (4.21, 59.96, 200, 7265)] == [
        "4.2 s",
        "1 min 00 s",
        "3 min 20 s",
        "2 h 01 min",
    ]
    assert [amount(x, "B") for x in (650, 2600, 44_695_848, 2e12)] == ["650 B", "2.6 kB", "44.7 MB", "2 TB"]


def test_a_page_that_cannot_be_written_is_named(minimal: Content, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"could not write .*report\.html"):
        write_html(Report.model_validate(minimal), tmp_path / "none" / "report.html")


def run(seed: int, losses: dict[int, float]) -> Content:
    curve = [{"step": step, "epoch": 1.0, "loss": loss, "validate": loss} for step, loss in losses.items()]
    return {"seed": seed, "value": 1.0, "seconds": 1.0, "steps": 30, "curve": curve}


def hostile(content: Content) -> Content:
    """The same report with code for every name."""
    text = json.dumps(content)
    for name, attack in zip(content["classes"], HOSTILE, strict=True):
        text = text.replace(json.dumps(name), json.dumps(attack))
    text = text.replace('"KD"', json.dumps(HOSTILE[1])).replace('"scratch"', json.dumps(HOSTILE[3]))
    changed: Content = json.loads(text.replace('"kd"', json.dumps(HOSTILE[2])))
    words = {"name": 0, "why": 1, "metric": 4, "commit": 5, "method": 6, "task": 7}
    return changed | {key: HOSTILE[i] for key, i in words.items()} | {"warnings": [HOSTILE[1]]}


def large(content: Content) -> Report:
    """200 classes, three seeds of 1500 logged steps."""
    content = copy.deepcopy(content)
    classes = [f"class {i}" for i in range(200)]
    point = content["arms"][0]["runs"][0]["curve"][4]
    for one in content["arms"]:
        curve = [{**point, "step": step} for step in range(1, 1501)]
        one["runs"] = [{**one["runs"][0], "seed": seed, "curve": curve} for seed in range(3)]
        one["per_class"] = None
    content["classes"] = classes
    content["per_class_gain"] = [
        {"class": name, "gain": i / 1000 - 0.1, "low": i / 1000 - 0.2, "high": i / 1000, "count": 50}
        for i, name in enumerate(classes)
    ]
    content["disagreement"] = {"matrix": [[(r * c) % 7 for c in range(200)] for r in range(200)]}
    return Report.model_validate(content)


def tags(page: str) -> dict[str, int]:
    """How often each element opens."""
    found: dict[str, int] = {}

    class Counter(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            found[tag] = found.get(tag, 0) + 1

    Counter().feed(page)
    return found


def contrast(first: str, second: str) -> float:
    """WCAG contrast ratio of two `rgb(r, g, b)` colours."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)

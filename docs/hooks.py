"""Pages that mkdocs generates from the code: the methods, from the catalogue, and what proofs and benchmarks found."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # proofs is no installed package
# ruff: noqa: E402 - so the imports have to wait for it

from proofs.proof import names
from proofs.result import Gain, ProofResult
from proofs.runner import RESULTS
from proofs.table import page as results_page
from transfuse.core.catalogue import Entry, entries
from transfuse.report import Report
from transfuse.report.numbers import number, signed

TABLE = re.compile(r"^\[(run|benchmark): ([\w-]+)\]$", re.MULTILINE)
ROLE = re.compile(r":(?:class|func|mod|data|meth|attr):<code>(~?)([\w.]+)</code>")
REQUEST = re.compile(r'<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"')


def on_config(config: MkDocsConfig) -> None:
    """Put the generated pages into the navigation."""
    families: dict[str, list[str]] = {}
    for entry in entries():
        families.setdefault(entry.family, []).append(_path(entry))
    pages: list[Any] = ["methods/index.md", {"Results": "methods/results.md"}]
    pages += [{family: paths} for family, paths in families.items()]
    assert config.nav is not None
    config.nav = [{"Methods": pages} if item == {"Methods": []} else item for item in config.nav]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Write the generated pages."""
    proofs = _proofs()
    pages = {_path(entry): method_page(entry, proofs) for entry in entries()}
    pages["methods/index.md"] = methods_page(entries(), proofs)
    pages["methods/results.md"] = results_page(proofs)
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Tables: `[run: smollm2]` is docs/results/smollm2.json, `[benchmark: merge]` is benchmarks/results/merge.json."""
    return TABLE.sub(lambda found: {"run": run_table, "benchmark": benchmark_table}[found[1]](found[2]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name things by role, for readers of the code; readers of the page want the name alone."""
    return ROLE.sub(lambda role: f"<code>{role[2].split('.')[-1] if role[1] else role[2]}</code>", html)


def on_post_page(output: str, page: Any, **_: Any) -> None:
    """Refuse a page that would load something from another machine."""
    if found := REQUEST.search(output):
        raise PluginError(f"{page.file.src_path} makes an external request: {found[0]}")


def run_table(name: str) -> str:
    """Markdown: every arm of a language model's run, its teacher, and how many tokens a second it was trained on."""
    report = Report.read(ROOT / "docs" / "results" / f"{name}.json")
    training, data = report.recipe["training"], report.recipe["data"]["args"]
    rows = ["| arm | bits per byte | agreement | NLL | tokens per second |", "|---|---|---|---|---|"]
    for arm in report.arms:
        run = arm.runs[0]
        speed = run.steps * training["batch_size"] * data["context"] / run.seconds
        found = (run.metrics[metric] for metric in ("bits_per_byte", "agreement", "nll"))
        rows.append(f"| {arm.name} | {' | '.join(f'{value:.3f}' for value in found)} | {speed:.0f} |")
    assert report.source is not None
    teacher = report.source.metrics
    rows.append(f"| teacher | {teacher['bits_per_byte']:.3f} | | {teacher['nll']:.3f} | |")
    return "\n".join(rows)


def benchmark_table(name: str) -> str:
    """Markdown: every comparison of a benchmark, and the machine it ran on."""
    found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    rows = ["| ours over theirs | median | least | most | limit |", "|---|---|---|---|---|"]
    for label, ratio in found["ratios"].items():
        numbers = (ratio["median"], ratio["min"], ratio["max"], found["limits"][label])
        rows.append(f"| {label} | {' | '.join(f'{value:.2f}' for value in numbers)} |")
    machine = found["machine"]
    where = machine["accelerator"] or f"{machine['cpu']}, {machine['cores']} cores"
    return "\n".join([*rows, "", f"`python -m benchmarks {name}` on {where}, torch {found['versions']['torch']}."])


def methods_page(methods: Sequence[Entry], proofs: Sequence[ProofResult]) -> str:
    """Markdown: every method in one table, with what it needs and what its proof found."""
    rows = [
        "| method | what it does | knowledge in | source gives | data at least | result | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in methods:
        name = f"[{entry.name}]({entry.family}/{entry.name.lower()}.md)"
        about = [proof.about(entry.name) for proof in proofs if entry.name in proof.proves]
        found = [(_gain(gain), verdict) for gain, verdict in filter(None, about)]
        gain, verdict = found[0] if found else ("", "control" if entry.card.control else "no proof yet")
        card = entry.card
        cells = (name, entry.summary, card.carries, card.teacher, card.data, gain, verdict)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([INTRODUCTION, *rows]) + "\n"


INTRODUCTION = """# Methods

Generated from the catalogue (`transfuse methods --json`) and the [results](results.md) of the proofs.
A result is the gain over the proof's baseline, with its 95 % interval over test samples and seeds.
`transfuse methods --data unlabelled --teacher full` answers what works in a situation.
"""


def method_page(entry: Entry, proofs: Sequence[ProofResult]) -> str:
    """Markdown: the card, the docstring and the results of one method."""
    card = entry.card
    arxiv = f", [arXiv:{card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else ""
    facts = {
        "paper": card.paper + arxiv,
        "knowledge in": card.carries,
        "source gives": card.teacher,
        "data at least": card.data,
        "tasks": ", ".join(card.tasks),
        "import": f"`from transfuse.{entry.family} import {entry.name}`",
    }
    listed = [f"- **{name}**: {value}" for name, value in facts.items()]
    options = "{ members: false, show_bases: false, show_root_heading: false }"
    docstring = f"::: {entry.module}.{entry.name}\n    options: {options}\n"
    results = [_result(entry.name, proof) for proof in proofs if entry.name in proof.proves]
    if not results:
        results = ["A control arm: there is nothing to prove." if card.control else "No proof has been run yet."]
    return "\n".join([f"# {entry.name}", "", docstring, "## Card", "", *listed, "", "## Result", "", *results]) + "\n"


def _result(name: str, proof: ProofResult) -> str:
    arms = ", ".join(f"{arm} {number(proof.average(arm))}" for arm in proof.arms)
    about = proof.about(name)
    found = (
        f"**{about[1]}**: {_gain(about[0])} {proof.metric} over {proof.baseline}"
        if about
        else "the baseline of a proof"
    )
    limits = f"\n\nExpected: {proof.expected}.\n\nWhat to know: {proof.notes}" if proof.notes else ""
    return (
        f"{found} ({arms}; {len(proof.seeds)} seeds). Data: {proof.data}. "
        f"[The whole proof](../results.md#{proof.name}).{limits}\n"
    )


def _gain(gain: Gain) -> str:
    return f"{signed(gain.mean)} [{signed(gain.low)}, {signed(gain.high)}]"


def _proofs() -> list[ProofResult]:
    return [ProofResult.read(path) for name in names() if (path := RESULTS / f"{name}.json").exists()]


def _path(entry: Entry) -> str:
    return f"methods/{entry.family}/{entry.name.lower()}.md"

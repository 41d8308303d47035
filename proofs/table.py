"""The results page of the documentation, drawn from `proofs/results/*.json`; no number is typed by hand."""

from __future__ import annotations

from collections.abc import Sequence

from proofs.proof import SHUFFLED
from proofs.result import Gain, ProofResult
from transfuse.report.numbers import number, signed


def page(results: Sequence[ProofResult]) -> str:
    """Markdown: one table of all proofs, then one section for each."""
    summary = _table(
        ("method", "data", "baseline", "metric", "gain over the baseline", "verdict"),
        [
            (f"[{', '.join(r.proves)}](#{r.name})", r.data, _code(r.baseline), r.metric, _gain(r.gain), r.verdict)
            for r in results
        ],
    )
    return "\n\n".join([INTRODUCTION, summary, *map(_section, results)]) + "\n"


INTRODUCTION = f"""# Results

Drawn by `python -m proofs table` from the results that `python -m proofs run` writes. Arms of a proof share budget and
seeds. Gains are improvements, with their 95 % interval over test samples and seeds. A method that surely improves on
the baseline, and on itself with a {SHUFFLED}, has *arrived*."""


def _section(result: ProofResult) -> str:
    arms = [
        (_code(arm), number(result.average(arm)), ", ".join(map(number, result.values(arm))), _over(result, arm))
        for arm in result.arms
    ]
    source = result.source
    facts = [
        f"- data: {result.data}",
        *([f"- source: {source.name}{_measured(result)}"] if source else []),
        f"- expected: {result.expected}",
        *([f"- notes: {result.notes}"] if result.notes else []),
        f"- made on {result.date} at commit {(result.commit or 'unknown')[:12]}, {result.machine.cpu}",
    ]
    table = _table(("arm", result.metric, "by seed", "gain of the method"), arms)
    return f"## {', '.join(result.proves)} {{#{result.name}}}\n\n{table}\n\n" + "\n".join(facts)


def _measured(result: ProofResult) -> str:
    """The source's own score, where it is a model that can be scored."""
    value = result.source.metrics.get(result.metric) if result.source else None
    return "" if value is None else f", {result.metric} {number(value)}"


def _over(result: ProofResult, arm: str) -> str:
    return _gain(result.gains[arm]) if arm in result.gains else ""


def _gain(gain: Gain) -> str:
    return f"{signed(gain.mean)} [{signed(gain.low)}, {signed(gain.high)}]"


def _code(name: str) -> str:
    return f"`{name}`"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)

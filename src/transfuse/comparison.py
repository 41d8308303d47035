"""From what every arm did, seed by seed, to a report with a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transfuse import measure
from transfuse.core.machine import commit, machine, versions
from transfuse.evaluation import HIGHER_IS_BETTER, Evaluation
from transfuse.measure import Interval

if TYPE_CHECKING:
    from transfuse.report.schema import Report


@dataclass
class ArmRun:
    """One arm trained with one seed."""

    seed: int
    seconds: float
    steps: int
    curve: list[dict[str, Any]]
    warnings: list[str]
    evaluation: Evaluation | None
    stages: list[dict[str, float]] = field(default_factory=list)
    panels: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class ArmResult:
    """One arm of a comparison over all seeds; `role` as in :class:`~transfuse.report.schema.Arm`."""

    name: str
    role: str
    runs: list[ArmRun] = field(default_factory=list)

    def values(self, metric: str) -> Tensor:
        """One row per seed, one column per sample."""
        return torch.stack([run.evaluation.values[metric] for run in self.runs if run.evaluation])

    @property
    def evaluations(self) -> list[Evaluation]:
        """One per seed."""
        return [run.evaluation for run in self.runs if run.evaluation]


@dataclass(frozen=True)
class Facts:
    """What a report says besides the arms."""

    name: str
    method: str
    task: str
    metric: str
    source: tuple[str, Evaluation | None] | None
    classes: Sequence[str] | None
    cost: Mapping[str, Any]
    recipe: Mapping[str, Any]
    warnings: Sequence[str]
    panels: Sequence[Mapping[str, Any]] = ()


def compare(arms: Sequence[ArmResult], facts: Facts) -> Report:
    """Judge the first arm, the method, and every other one, against the first baseline.

    Gains are improvements: positive is better whichever way the metric points. Without a baseline the
    shuffled teacher stands in for it, or else the first other method; without any nothing is judged.
    """
    from transfuse.report.schema import Report

    method = arms[0]
    measured = bool(method.evaluations)
    ranked = [a for role in ("baseline", "control", "method (compared)") for a in arms[1:] if a.role == role]
    baseline = next(iter(ranked), None)
    control = next((a for a in arms if a.role == "control"), None)
    gains = {a.name: gain(a, baseline, facts.metric) for a in arms if measured and baseline and a is not baseline}
    word, why = measure.NOT_COMPARED, NO_BASELINE if measured else NO_DATA
    if method.name in gains:
        beyond = gain(method, control, facts.metric) if control and control is not baseline else None
        word, why = measure.verdict(gains[method.name], beyond)
    judged = {name: measure.verdict(g)[0] for name, g in gains.items()} | {method.name: word}
    return Report.model_validate(
        {
            "name": facts.name,
            "created": datetime.now(UTC),
            "task": facts.task,
            "metric": facts.metric,
            "higher_is_better": HIGHER_IS_BETTER[facts.metric],
            "verdict": word,
            "why": why,
            "gain": _gain(gains.get(method.name), baseline),
            "method": facts.method,
            "arms": [_arm(a, facts, _gain(gains.get(a.name), baseline), judged.get(a.name)) for a in arms],
            "source": _source(facts),
            "classes": None if facts.classes is None else list(facts.classes),
            "per_class_gain": _per_class_gain(method, baseline, facts) if measured and baseline else None,
            "disagreement": _disagreement(method, facts),
            "panels": [
                *by_set(arms, facts.metric),
                *by_stage(arms, facts.metric),
                *method.runs[0].panels,
                *facts.panels,
            ],
            "cost": facts.cost,
            "recipe": dict(facts.recipe),
            "versions": versions(),
            "machine": machine(),
            "commit": commit(),
            "warnings": list(facts.warnings),
        }
    )


NO_BASELINE = (
    'Nothing to compare with: add compare=["scratch", "shuffled teacher"] to learn whether the knowledge arrived.'
)
NO_DATA = "Nothing was measured: pass held-out data as validate=... or test=..."


def gain(arm: ArmResult, against: ArmResult, metric: str) -> Interval:
    """By how much an arm is better than another, paired over seeds and samples."""
    better, worse = (arm, against) if HIGHER_IS_BETTER[metric] else (against, arm)
    return measure.paired(better.values(metric), worse.values(metric))


def by_set(arms: Sequence[ArmResult], metric: str) -> list[dict[str, Any]]:
    """The metric of every arm on each of several held-out sets, the mean over seeds."""
    found = {arm.name: [e.by_set(metric) for e in arm.evaluations] for arm in arms}
    names = list(dict.fromkeys(name for runs in found.values() for run in runs for name in run))
    if not names:
        return []
    values = [[_mean(run.get(name) for run in runs) for name in names] for runs in found.values()]
    note = "Each arm's mean over seeds. An arm may lead on the whole and lose where it matters to you: look for that."
    kind = {"kind": "bars", "title": f"{metric} on each held-out set", "note": note}
    return [{**kind, "y": metric, "rows": list(found), "groups": names, "values": values}]


def by_stage(arms: Sequence[ArmResult], metric: str) -> list[dict[str, Any]]:
    """The method's matrix of held-out sets by stage, and how every arm went from stage to stage."""
    staged = [arm for arm in arms if arm.runs and arm.runs[0].stages]
    if not staged:
        return []
    panels: list[dict[str, Any]] = []
    if len(sets := list(staged[0].runs[0].stages[0])) > 1:
        rows = [[_mean(run.stages[i].get(name) for run in staged[0].runs) for name in sets] for i in _stages(staged[0])]
        note = "Row by row: after each stage, the score on every set. A column that fades downwards was forgotten."
        matrix = {"kind": "matrix", "title": f"{metric} after each stage: {staged[0].name}", "note": note}
        names = [f"after {i + 1}" for i in _stages(staged[0])]
        panels.append({**matrix, "x": "set", "y": "stage", "rows": names, "columns": sets, "values": rows})
    series = {
        arm.name: [(i + 1, _mean(_seen(run.stages[i], i, _stages(arm)) for run in arm.runs)) for i in _stages(arm)]
        for arm in staged
    }
    note = "The mean over the sets seen so far. A line that falls loses more of the old than it gains of the new."
    lines = {"kind": "lines", "title": f"{metric} from stage to stage", "note": note, "x": "stage", "y": metric}
    return [*panels, {**lines, "series": series}]


def _stages(arm: ArmResult) -> range:
    return range(min(len(run.stages) for run in arm.runs))


def _seen(scores: Mapping[str, float], stage: int, stages: range) -> float | None:
    """The mean over the sets that were learned until a stage, where each stage has one of its own; else over all."""
    values = list(scores.values())
    return _mean(values[: stage + 1] if len(values) == len(stages) else values)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _gain(interval: Interval | None, against: ArmResult | None) -> dict[str, Any] | None:
    return None if interval is None or against is None else {**interval.as_dict(), "against": against.name}


def _arm(arm: ArmResult, facts: Facts, gain: dict[str, Any] | None, judged: str | None) -> dict[str, Any]:
    metric = facts.metric
    runs = [
        {
            "seed": run.seed,
            "value": run.evaluation.metrics[metric] if run.evaluation else None,
            "seconds": run.seconds,
            "steps": run.steps,
            "metrics": _finite(run.evaluation.metrics) if run.evaluation else {},
            "sets": run.evaluation.by_set(metric) if run.evaluation else {},
            "stages": run.stages,
            "curve": run.curve,
            "warnings": run.warnings,
        }
        for run in arm.runs
    ]
    found: dict[str, Any] = {"name": arm.name, "role": arm.role, "verdict": judged, "gain": gain, "runs": runs}
    if not arm.evaluations:
        return found | {"value": None}
    found["value"] = measure.bootstrap(arm.values(metric)).as_dict()
    logits, labels = _pooled(arm)
    if facts.classes is not None and logits is not None and labels is not None:
        bins = measure.reliability(logits, labels)
        found["calibration"] = {
            "confidence": _nullable(bins.confidence),
            "accuracy": _nullable(bins.accuracy),
            "count": bins.count.tolist(),
        }
        right = measure.correct(logits, labels)
        found["per_class"] = _nullable(measure.per_class_accuracy(right, labels, len(facts.classes)))
    return found


def _source(facts: Facts) -> dict[str, Any] | None:
    if facts.source is None:
        return None
    name, evaluation = facts.source
    metrics = _finite(evaluation.metrics) if evaluation else {}
    return {"name": name, "value": metrics.get(facts.metric), "metrics": metrics}


def _per_class_gain(method: ArmResult, baseline: ArmResult, facts: Facts) -> list[dict[str, Any]] | None:
    labels = method.evaluations[0].labels
    if facts.classes is None or labels is None or facts.metric != "accuracy":
        return None
    values, others = method.values("accuracy"), baseline.values("accuracy")
    rows = measure.per_class_gain(values, others, labels, len(facts.classes))
    return [{**row, "class": facts.classes[int(row["class"])]} for row in rows]


def _disagreement(method: ArmResult, facts: Facts) -> dict[str, Any] | None:
    reference = facts.source[1].logits if facts.source and facts.source[1] else None
    if facts.classes is None or reference is None:
        return None
    tables = [
        measure.disagreement(e.logits, reference, len(facts.classes))
        for e in method.evaluations
        if e.logits is not None and e.logits.shape == reference.shape
    ]
    return {"matrix": sum(tables[1:], tables[0]).tolist()} if tables else None


def _pooled(arm: ArmResult) -> tuple[Tensor | None, Tensor | None]:
    """Logits and labels of all seeds, one after the other."""
    found = [(e.logits, e.labels) for e in arm.evaluations if e.logits is not None and e.labels is not None]
    if not found:
        return None, None
    return torch.cat([logits for logits, _ in found]), torch.cat([labels for _, labels in found])


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _nullable(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]

"""From a declared proof to its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from typing import Any

from torch import nn
from torch.utils.data import Dataset, Subset

from proofs.proof import HERE, SHUFFLED, Proof, Trained
from proofs.result import Gain, ProofResult, Run
from transfuse import measure, transfer
from transfuse.comparison import ArmRun, gain
from transfuse.core.machine import commit, machine, versions
from transfuse.distill import Labels
from transfuse.evaluation import HIGHER_IS_BETTER
from transfuse.measure import Interval

RESULTS = HERE / "results"
SMOKE_STEPS, SMOKE_SAMPLES = 4, 128


def run(proof: Proof, smoke: bool = False) -> ProofResult:
    """Train the source and every arm with every seed, test, and judge.

    Args:
        smoke: a few updates, one seed and a few test samples: shows that the machinery works, and nothing else.
    """
    splits = proof.splits()
    test: Dataset[Any] | None = splits.test
    training, seeds = proof.training, proof.seeds
    if smoke:
        training, seeds = _short(training), seeds[:1]
        test = Subset(splits.test, range(SMOKE_SAMPLES)) if splits.test else None
    result = transfer(
        proof.method,
        source=_trained(proof.source, smoke),
        target=proof.target,
        data=splits.train,
        test=test,
        compare=proof.compare,
        seeds=seeds,
        classes=splits.classes,
        name=proof.name,
        **training,
    )
    method, *others = result.arms
    gains = {arm.name: gain(method, arm, proof.metric) for arm in others}
    return ProofResult.model_validate(
        {
            "name": proof.name,
            "sheet": proof.sheet,
            "family": proof.family,
            "proves": list(proof.proves),
            "method": method.name,
            "data": proof.data,
            "source": result.report.source,
            "training": dict(training),
            "metric": proof.metric,
            "higher_is_better": HIGHER_IS_BETTER[proof.metric],
            "baseline": proof.baseline,
            "runs": [_run(arm.name, run, proof.metric) for arm in (method, *others) for run in arm.runs],
            "gain": _gain(gains[proof.baseline]),
            "gains": {name: _gain(interval) for name, interval in gains.items()},
            "verdict": measure.verdict(gains[proof.baseline], gains.get(SHUFFLED))[0],
            "expected": proof.expected,
            "notes": proof.notes,
            "machine": machine(),
            "versions": versions(),
            "commit": commit(HERE),
            "date": datetime.now(UTC).date(),
        }
    )


def _short(training: Mapping[str, Any]) -> dict[str, Any]:
    return {**training, "epochs": None, "steps": SMOKE_STEPS}


@cache
def _trained(source: Trained, smoke: bool) -> nn.Module:
    if smoke:
        source = replace(source, training=_short(source.training))
    return transfer(Labels(), target=source.build, data=source.splits().train, **source.training).model


def _run(arm: str, run: ArmRun, metric: str) -> Run:
    assert run.evaluation is not None
    return Run(seed=run.seed, arm=arm, value=run.evaluation.metrics[metric], seconds=round(run.seconds, 3))


def _gain(interval: Interval) -> Gain:
    return Gain(mean=interval.mean, low=interval.low, high=interval.high)

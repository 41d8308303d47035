"""From a declared proof to its result."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset, Subset

from proofs.proof import HERE, SHUFFLED, Proof, Trained
from proofs.result import Gain, ProofResult, Run
from transfuse import Transfer, measure, transfer
from transfuse.comparison import ArmResult, ArmRun, gain
from transfuse.core.checkpoint import load_state
from transfuse.core.machine import commit, machine, versions
from transfuse.distill import Labels
from transfuse.evaluation import HIGHER_IS_BETTER, Evaluation
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
    with tempfile.TemporaryDirectory() as folder:
        experiment = Transfer(
            proof.method,
            source=_trained(proof.source, smoke),
            target=proof.target,
            data=splits.train,
            test=test,
            compare=proof.compare,
            seeds=seeds,
            classes=splits.classes,
            out=Path(folder) / "run",
            name=proof.name,
            **training,
        )
        report = experiment.run().report
        method, *others = _arms(experiment)
    gains = {arm.name: gain(method, arm, proof.metric) for arm in others}
    return ProofResult.model_validate(
        {
            "name": proof.name,
            "sheet": proof.sheet,
            "family": proof.family,
            "proves": list(proof.proves),
            "method": method.name,
            "data": proof.data,
            "source": report.source,
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


def _arms(experiment: Transfer) -> list[ArmResult]:
    """What every arm did, sample by sample: a report compares with one baseline, a proof with every arm."""
    assert experiment.out is not None
    arms = []
    for arm in experiment.arms:
        runs = []
        for seed in experiment.seeds:
            state = load_state(experiment.out / "arms" / arm.folder / f"seed-{seed}" / "run.safetensors")
            runs.append(ArmRun(**{**state, "evaluation": Evaluation(**state["evaluation"])}))
        arms.append(ArmResult(arm.name, arm.role, runs))
    return arms


def _run(arm: str, run: ArmRun, metric: str) -> Run:
    assert run.evaluation is not None
    return Run(seed=run.seed, arm=arm, value=run.evaluation.metrics[metric], seconds=round(run.seconds, 3))


def _gain(interval: Interval) -> Gain:
    return Gain(mean=interval.mean, low=interval.low, high=interval.high)

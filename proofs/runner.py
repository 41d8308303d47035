"""From a declared proof to its result."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from proofs.proof import HERE, Proof, Trained, find
from proofs.result import Gain, ProofResult, Run
from proofs.study import Study
from transfuse import measure, transfer
from transfuse.comparison import ArmRun, gain
from transfuse.core import rng
from transfuse.core.checkpoint import load_weights, save_weights
from transfuse.core.files import make_folder
from transfuse.core.machine import commit, machine, versions
from transfuse.datasets import Splits
from transfuse.distill import Labels
from transfuse.evaluation import HIGHER_IS_BETTER
from transfuse.measure import Interval
from transfuse.report.numbers import signed

RESULTS = HERE / "results"
SMOKE_STEPS, SMOKE_SAMPLES = 4, 128


def run(proof: Proof | Study, smoke: bool = False) -> ProofResult:
    """Make every arm's runs with every seed, test, and judge.

    Args:
        smoke: a few updates, one seed and a few test samples: shows that the machinery works, and nothing else.
    """
    return _run_study(proof, smoke) if isinstance(proof, Study) else _run_proof(proof, smoke)


def record(name: str, smoke: bool, file: Path) -> str:
    """Run a proof by its name, write its result, and say it in a line."""
    result = run(find(name), smoke)
    result.write(file)
    return f"{name}: {result.verdict}, {signed(result.gain.mean)} over {result.baseline}"


def _run_proof(proof: Proof, smoke: bool) -> ProofResult:
    """Train the source and every arm with every seed."""
    splits = proof.splits()
    test, training, seeds = splits.test, proof.training, proof.seeds
    if smoke:
        training, seeds, test = _short(training), seeds[:1], _few(splits.test)
    result = transfer(
        proof.method,
        source=_source(proof.source, smoke),
        target=trained(proof.target, smoke) if isinstance(proof.target, Trained) else proof.target,
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
    control = next((gains[arm.name] for arm in others if arm.role == "control"), None)
    return _result(
        proof,
        [_run(arm.name, run, proof.metric) for arm in (method, *others) for run in arm.runs],
        gains,
        measure.verdict(gains[proof.baseline], control)[0],
        method=method.name,
        source=result.report.source,
        training=dict(training),
        higher_is_better=HIGHER_IS_BETTER[proof.metric],
    )


def _run_study(study: Study, smoke: bool) -> ProofResult:
    """Run the trial of every seed; what varies is the seed alone, so intervals are over seeds."""
    runs = []
    for seed in study.seeds[:1] if smoke else study.seeds:
        began = time.monotonic()
        found = study.values(seed, smoke)
        seconds = round(time.monotonic() - began, 3)
        runs += [
            Run(seed=seed, arm=arm, value=metrics.pop(study.metric), seconds=seconds, metrics=metrics)
            for arm, metrics in found.items()
        ]
    values = {arm: torch.tensor([[r.value] for r in runs if r.arm == arm]) for arm in study.arms}
    method, sign = study.arms[0], 1 if study.higher_is_better else -1
    gains = {arm: measure.paired(sign * values[method], sign * values[arm]) for arm in study.arms[1:]}
    return _result(
        study,
        [run for arm in study.arms for run in runs if run.arm == arm],
        gains,
        measure.verdict(gains[study.baseline])[0],
        method=method,
        source=None,
        training={},
        higher_is_better=study.higher_is_better,
    )


def _result(
    proof: Proof | Study, runs: Sequence[Run], gains: Mapping[str, Interval], verdict: str, **facts: Any
) -> ProofResult:
    over = {name: Gain(mean=g.mean, low=g.low, high=g.high) for name, g in gains.items()}
    return ProofResult.model_validate(
        {
            "name": proof.name,
            "sheet": proof.sheet,
            "family": proof.family,
            "proves": list(proof.proves),
            "data": proof.data,
            "metric": proof.metric,
            "baseline": proof.baseline,
            "runs": list(runs),
            "gain": over[proof.baseline],
            "gains": over,
            "verdict": verdict,
            "expected": proof.expected,
            "notes": proof.notes,
            "machine": machine(),
            "versions": versions(),
            "commit": commit(HERE),
            "date": datetime.now(UTC).date(),
            **facts,
        }
    )


def _short(training: Mapping[str, Any]) -> dict[str, Any]:
    return {**training, "epochs": None, "steps": SMOKE_STEPS}


def _few(test: Any) -> Any:
    """The first samples of one test set, or of each of several."""
    if isinstance(test, Mapping):
        return {name: _few(part) for name, part in test.items()}
    if isinstance(test, list | tuple):
        return [_few(part) for part in test]
    return test and Subset(test, range(min(SMOKE_SAMPLES, len(test))))


def _source(source: Any, smoke: bool) -> Any:
    """What a proof declares as its source, as a transfer takes it."""
    if isinstance(source, Trained):
        return trained(source, smoke)
    if isinstance(source, list | tuple):
        return [_source(each, smoke) for each in source]
    return source and source()


@cache
def trained(source: Trained, smoke: bool = False) -> nn.Module:
    """A source after its training: once per process, or once for all where `TRANSFUSE_TEACHERS` names a folder."""
    if smoke:
        source = replace(source, training=_short(source.training))
    splits = source.splits()
    kept = _kept(source, splits)
    if kept and kept.exists():
        model = source.build()
        load_weights(kept, model)
        return model
    model = transfer(Labels(), target=source.build, data=splits.train, task=splits.task, **source.training).model
    if kept:
        make_folder(kept.parent)
        save_weights(kept, model)
    return model


def _kept(source: Trained, splits: Splits) -> Path | None:
    """Where the weights of this source are kept: a name that follows from its first weights, data and training.

    The code that trains is not in the name: whoever changes it empties the folder.
    """
    folder = os.environ.get("TRANSFUSE_TEACHERS")
    if folder is None or not isinstance(splits.train, TensorDataset):
        return None
    with rng.scope(0):
        first = source.build().state_dict()
    content = hashlib.sha256(f"{dict(source.training)} {torch.__version__}".encode())
    for tensor in (*first.values(), *splits.train.tensors):
        content.update(tensor.contiguous().numpy().tobytes())
    return Path(folder) / f"{content.hexdigest()[:16]}.safetensors"


def _run(arm: str, run: ArmRun, metric: str) -> Run:
    assert run.evaluation is not None
    others = {name: value for name, value in run.evaluation.metrics.items() if name != metric}
    return Run(
        seed=run.seed, arm=arm, value=run.evaluation.metrics[metric], seconds=round(run.seconds, 3), metrics=others
    )

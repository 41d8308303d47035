"""What the studies of networks that learn at once share: networks drawn by a seed, and every number of every arm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.data import Dataset, Subset

from transfuse.core import rng
from transfuse.experiment import Result
from transfuse.measure import brier_score

SMOKE = {"epochs": None, "steps": 4}


def drawn(build: Callable[[], nn.Module], *purpose: object) -> nn.Module:
    """A network whose initial weights follow from the purpose."""
    with rng.scope(rng.derive(*purpose)):
        return build()


def budget(training: Mapping[str, Any], smoke: bool) -> dict[str, Any]:
    """The training of all arms, or a few updates of it."""
    return {**training, **SMOKE} if smoke else dict(training)


def held_out(test: Dataset[Any] | None, smoke: bool) -> Dataset[Any]:
    """The test pictures, or a few of them."""
    assert test is not None
    return Subset(test, range(128)) if smoke else test


def numbers(result: Result) -> dict[str, dict[str, float]]:
    """Accuracy, NLL, ECE and Brier score at temperature 1 of every arm of a transfer with one seed."""
    found = {}
    for arm in result.arms:
        evaluation = arm.evaluations[0]
        assert evaluation.logits is not None
        assert evaluation.labels is not None
        brier = float(brier_score(evaluation.logits, evaluation.labels).mean())
        kept = {name: evaluation.metrics[name] for name in ("accuracy", "nll", "ece")}
        found[arm.name] = {**kept, "brier": brier}
    return found

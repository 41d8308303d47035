"""Merges of two models, and of one with its start: arcs and small steps beside the average."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from torch import nn

from proofs.runner import SMOKE_SAMPLES
from proofs.study import Study
from proofs.weights._letters import accuracy, base, frozen_head, learned
from proofs.weights.merges import parts
from transfuse import transfer
from transfuse.distill import Labels
from transfuse.weights import SLERP, Linear, Merge, NearSwap, NuSLERP, Passthrough

TASKS = ("inverted", "small")


def trial(seed: int, smoke: bool) -> Mapping[str, float]:
    """The mean accuracy over both tasks."""
    start, data = base(smoke), [parts(task, seed) for task in TASKS]
    if smoke:
        data = [tuple((x[:SMOKE_SAMPLES], y[:SMOKE_SAMPLES]) for x, y in sets) for sets in data]  # type: ignore[misc]
    given: dict[str, Any] = {"steps": 100, "lr": 2e-3}
    models = [learned(Labels(), None, frozen_head(start), tune, smoke, seed, **given) for tune, _, _ in data]
    tests = [test for _, _, test in data]

    def mean(method: Merge, sources: list[nn.Module]) -> float:
        model = transfer(method, sources, start, None, test=tests[0], task="classification").model
        return fmean(accuracy(model, pair) for pair in tests)

    return {
        "SLERP": mean(SLERP(), models),
        "NuSLERP of what was learned": mean(NuSLERP(), models),
        "average": mean(Linear(), models),
        "NearSwap of the first into the start": mean(NearSwap(0.05), models[:1]),
        "Passthrough of the first": mean(Passthrough(), models[:1]),
        "start": fmean(accuracy(start, pair) for pair in tests),
        "each on its own task": fmean(accuracy(m, pair) for m, pair in zip(models, tests, strict=True)),
    }


PROOF = Study(
    name="merges_of_two",
    proves=("SLERP", "NuSLERP", "NearSwap", "Passthrough"),
    data="as for `merges`, of the tasks inverted letters and small letters",
    trial=trial,
    arms=(
        "SLERP", "NuSLERP of what was learned", "average", "NearSwap of the first into the start",
        "Passthrough of the first", "start", "each on its own task",
    ),
    baseline="average",
    metric="mean accuracy over tasks",
    expected="SLERP within a point of the average, for models near each other lie on a nearly flat arc; NuSLERP of task "
    "vectors, which keeps their length, above it; NearSwap and Passthrough know one of the two tasks",
)  # fmt: skip

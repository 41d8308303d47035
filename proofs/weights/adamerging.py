"""AdaMerging: does one model that is sure of five unlabelled tasks read all of them?"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from torch import Tensor, nn

from proofs.study import Study
from proofs.weights._letters import Pair, accuracy, base, learned, noisy, pictures, tuned, turned
from transfuse import transfer
from transfuse.weights import AdaMerging, Linear

TRAINING: dict[str, Any] = {"steps": 80, "batch_size": 32, "optimizer": "adam", "lr": 1e-2, "weight_decay": 0.0}
"""The authors' 500 steps of 1e-3, shortened."""


def tasks() -> dict[str, Pair]:
    """Five tasks in fonts that no model has seen."""
    inputs, labels = pictures("latin", "upright", "test", copies=2)
    return {
        "turned": (turned(inputs, 25.0), labels),
        "inverted": (1 - inputs, labels),
        "digits": pictures("digits", "upright", "test", copies=2),
        "small": pictures("latin-small", "upright", "test", copies=2),
        "noise": (noisy(inputs), labels),
    }


def trial(seed: int, smoke: bool) -> Mapping[str, Mapping[str, float]]:
    """Accuracy on every task, and their mean."""
    data, start = tasks(), base(smoke)
    sources = [tuned(task, smoke) for task in data]
    bare: dict[str, Tensor] = {task: inputs for task, (inputs, _) in data.items()}
    first: nn.Module = learned(AdaMerging("task"), sources, start, bare, True, seed, lr=1e-12)
    models = {
        "layer-wise": learned(AdaMerging("layer"), sources, start, bare, smoke, seed, **TRAINING),
        "task-wise": learned(AdaMerging("task"), sources, start, bare, smoke, seed, **TRAINING),
        "task arithmetic 0.3": first,
        "average": transfer(Linear(), sources, start, test=data).model,
        "base": start,
    }
    found = {}
    for arm, model in models.items():
        each = {task: accuracy(model, pair) for task, pair in data.items()}
        found[arm] = {"accuracy": mean(each.values()), **each}
    each = {task: accuracy(model, pair) for model, (task, pair) in zip(sources, data.items(), strict=True)}
    return {**found, "five models": {"accuracy": mean(each.values()), **each}}


PROOF = Study(
    name="adamerging",
    proves=("AdaMerging",),
    data=(
        "five tasks of reading characters at 14x14 pixels in unseen fonts (capitals turned by 25 degrees, inverted, "
        "noisy; small letters; digits), 200 to 1,700 of each, without labels to merge by, with labels to test on"
    ),
    trial=trial,
    arms=("layer-wise", "task-wise", "task arithmetic 0.3", "average", "base", "five models"),
    baseline="task arithmetic 0.3",
    metric="accuracy",
    expected="layer-wise above task-wise, that above task arithmetic and the average; five models are the upper bound",
    notes="",
)

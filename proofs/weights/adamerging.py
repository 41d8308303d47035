"""AdaMerging: does one model that is sure of five unlabelled tasks read all of them?"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from proofs.study import Study
from proofs.weights._letters import CLASSES, LETTERS, PLAIN, Pair, Reader, base, learned, pictures, tuned, turned
from transfuse import transfer
from transfuse.core.streams import as_data
from transfuse.evaluation import evaluate
from transfuse.given import HeldOut
from transfuse.weights import AdaMerging, Linear

TRAINING: dict[str, Any] = {"steps": 80, "batch_size": 32, "optimizer": "adam", "lr": 1e-2, "weight_decay": 0.0}
"""The authors' 500 steps of 1e-3, shortened."""


DIGITS_TASK = 3
"""The number of the digits among the tasks."""


def tasks(part: str) -> dict[str, Pair]:
    """Five tasks in fonts that no model has seen."""
    plain = pictures("latin", PLAIN, part, copies=2)
    return {
        "italic": pictures("latin", "italic", part),
        "bold": pictures("latin", "bold upright", part),
        "serif": pictures("latin", "serif upright", part, copies=3),
        "digits": pictures("digits", "upright", part, copies=3),
        "turned": (turned(plain[0], 25.0), plain[1]),
    }


class Heads(Reader):
    """The reader, which answers with the characters of the task it is told: a head for digits, one for letters."""

    def forward(self, images: Tensor, task: int | None = None) -> Tensor:
        logits = super().forward(images)
        if task is None:
            return logits
        digits = torch.arange(CLASSES) >= LETTERS
        return logits.masked_fill(digits if task != DIGITS_TASK else ~digits, -1e4)


def trial(seed: int, smoke: bool, part: str = "test") -> Mapping[str, Mapping[str, float]]:
    """Accuracy on every task, and their mean."""
    data = tasks(part)
    start, sources = _heads(base(smoke)), [_heads(tuned(task, smoke)) for task in data]
    bare: dict[str, Tensor] = {task: inputs for task, (inputs, _) in data.items()}
    still = {**TRAINING, "lr": 1e-12}
    models = {
        "layer-wise": learned(AdaMerging("layer"), sources, start, bare, smoke, seed, **TRAINING),
        "task-wise": learned(AdaMerging("task"), sources, start, bare, smoke, seed, **TRAINING),
        "task arithmetic 0.3": learned(AdaMerging("task"), sources, start, bare, True, seed, **still),
        "average": transfer(Linear(), sources, start, test=data).model,
        "base": start,
    }
    found = {arm: _scores(model, data) for arm, model in models.items()}
    own = {task: _scores(model, data)[task] for task, model in zip(data, sources, strict=True)}
    return {arm: {"accuracy": mean(each.values()), **each} for arm, each in {**found, "five models": own}.items()}


def _heads(model: nn.Module) -> Heads:
    told = Heads()
    told.load_state_dict(model.state_dict())
    return told.eval()


def _scores(model: nn.Module, data: Mapping[str, Pair]) -> dict[str, float]:
    held_out = HeldOut({task: as_data(pair) for task, pair in data.items()})
    return evaluate(model, held_out, task="classification", batch_size=512).by_set("accuracy")


PROOF = Study(
    name="adamerging",
    proves=("AdaMerging",),
    data=(
        "five tasks of reading characters at 14x14 pixels in unseen fonts (italic, bold, serif and turned "
        "capitals, digits), 230 to 690 of each, without labels to merge by, with labels to test on; one copy of a base "
        "that reads plain capitals and digits was tuned to each in other fonts. Letters and digits have a head each"
    ),
    trial=trial,
    arms=("layer-wise", "task-wise", "task arithmetic 0.3", "average", "base", "five models"),
    baseline="task arithmetic 0.3",
    metric="accuracy",
    expected="layer-wise above task-wise, that above task arithmetic and the average; five models are the upper bound",
    notes="",
)

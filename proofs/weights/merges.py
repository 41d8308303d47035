"""Merges without data: eight networks that were tuned from one start, put together into one."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import torch
from torch import nn

from proofs.runner import SMOKE_SAMPLES
from proofs.study import Study
from proofs.weights._letters import TASKS, Pair, accuracy, base, frozen_head, learned
from transfuse import transfer
from transfuse.distill import Labels
from transfuse.weights import (
    DARE,
    DELLA,
    EMR,
    SCE,
    TIES,
    TSVM,
    Breadcrumbs,
    Fisher,
    GreedySoup,
    IsoC,
    Karcher,
    Linear,
    ModelStock,
    MultiSLERP,
    RegMean,
    TaskArithmetic,
)

SCALES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""For methods whose papers choose the scale on validation data."""
FREE: Mapping[str, Any] = {
    "TIES": lambda scale: TIES(scale=scale),
    "average": lambda scale: Linear(),
    "task arithmetic": lambda scale: TaskArithmetic(scale=scale),
    "DARE": lambda scale: DARE(scale=scale),
    "DARE-TIES": lambda scale: DARE(consensus=True, scale=scale),
    "DELLA": lambda scale: DELLA(scale=scale),
    "Breadcrumbs": lambda scale: Breadcrumbs(scale=scale),
    "SCE": lambda scale: SCE(0.5),
    "ModelStock": lambda scale: ModelStock(),
    "MultiSLERP": lambda scale: MultiSLERP(),
    "Karcher": lambda scale: Karcher(),
    "TSV-M": lambda scale: TSVM(scale),
    "Iso-C": lambda scale: IsoC(scale),
}
FIXED = ("average", "SCE", "ModelStock", "MultiSLERP", "Karcher")
ARMS = (
    *FREE,
    "Fisher",
    "RegMean",
    "greedy soup",
    "EMR (told the task)",
    "start",
    "single models",
    "each on its own task",
)
HELD = 3
"""Of the samples of a task: one part in three is tested on, one validates, one tunes."""


def parts(task: str, seed: int) -> tuple[Pair, Pair, Pair]:
    """Samples to tune by, to validate by and to test by, drawn by the seed."""
    inputs, labels = TASKS[task]()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).chunk(HELD)
    tune, validate, test = ((inputs[rows], labels[rows]) for rows in order)
    return tune, validate, test


def trial(seed: int, smoke: bool) -> Mapping[str, float]:
    """The mean accuracy over the tasks."""
    start = base(smoke)
    data = {task: parts(task, seed) for task in (list(TASKS)[1:3] if smoke else TASKS)}
    if smoke:
        data = {task: tuple((x[:SMOKE_SAMPLES], y[:SMOKE_SAMPLES]) for x, y in sets) for task, sets in data.items()}  # type: ignore[misc]
    models = [
        learned(Labels(), None, frozen_head(start), tune, smoke, seed, steps=100, lr=2e-3)
        for tune, _, _ in data.values()
    ]
    tests = [test for _, _, test in data.values()]
    validation = [validate for _, validate, _ in data.values()]

    def mean(model: nn.Module, sets: list[Pair]) -> float:
        return fmean(accuracy(model, pair) for pair in sets)

    def merged(method: Any, given: Any = None) -> nn.Module:
        return transfer(method, models, start, given, test=tests[0], batch_size=64, task="classification").model

    found: dict[str, float] = {}
    for name, method in FREE.items():
        scales = (1.0,) if name in FIXED or smoke else SCALES
        tried = {scale: merged(method(scale)) for scale in scales}
        best = max(scales, key=lambda s: mean(tried[s], validation)) if len(scales) > 1 else scales[0]
        found[name] = mean(tried[best], tests)
    few = {str(i): (x[:64], y[:64]) for i, (x, y) in enumerate(validation)}
    pooled = torch.cat([x for x, _ in validation]), torch.cat([y for _, y in validation])
    found["Fisher"] = mean(merged(Fisher(), few), tests)
    found["RegMean"] = mean(merged(RegMean(), few), tests)
    found["greedy soup"] = mean(merged(GreedySoup(), pooled), tests)
    told = merged(EMR())
    found["EMR (told the task)"] = fmean(accuracy(_Told(told, i), pair) for i, pair in enumerate(tests))
    found["start"] = mean(start, tests)
    found["single models"] = fmean(mean(model, tests) for model in models)
    found["each on its own task"] = fmean(accuracy(m, pair) for m, pair in zip(models, tests, strict=True))
    return found


class _Told(nn.Module):
    """A model of several tasks, told one of them."""

    def __init__(self, model: nn.Module, task: int):
        super().__init__()
        self.model, self.number = model, task

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(images, task=self.number)
        return logits


PROOF = Study(
    name="merges",
    proves=(
        "TIES", "Linear", "TaskArithmetic", "DARE", "DELLA", "Breadcrumbs", "SCE", "ModelStock", "MultiSLERP",
        "Karcher", "TSVM", "IsoC", "Fisher", "RegMean", "GreedySoup", "EMR",
    ),
    data="letters and digits of real fonts at 14x14 pixels, 36 classes: a small CNN (GroupNorm) taught plain capitals "
    "and digits, and eight copies tuned to turned, inverted, italic, bold, serif, noisy letters, small letters and "
    "digits. A third of each task's drawings tunes, a third validates (scales, and the data of Fisher, RegMean and "
    "soups), a third tests",
    trial=trial,
    arms=ARMS,
    baseline="average",
    metric="mean accuracy over tasks",
    expected="TIES, TSV-M and Iso-C above the average; EMR, which is told the task, near each model on its own task; "
    "every merge above the mean of single models; greedy soup near the best single model",
)  # fmt: skip

"""SimpleCIL and ADAM: do class means of a frozen encoder learn new digits class by class, and better beside a copy?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from proofs.small_fashion import small_fashion
from proofs.study import Study
from transfuse import measure, transfer
from transfuse.continual import ADAM, FineTune, Learner, PrototypeModel, Replay, SimpleCIL
from transfuse.datasets import digits, glyphs
from transfuse.distill import Labels
from transfuse.models import SmallCNN

SIDE = 14
TRAINING: dict[str, Any] = {
    "epochs": 20,
    "batch_size": 48,
    "optimizer": "sgd",
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "cosine",
}
"""The paper's, for ADAM's first task; fine-tuning and replay have as much for every task."""


@cache
def encoder(source: str, smoke: bool) -> nn.Module:
    """A small CNN that knows clothes, letters, or nothing; its features are 64 numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallCNN(classes=26 if source == "letters" else 10)
    if source == "nothing":
        return model
    data = small_fashion().train if source == "clothes" else glyphs("latin", size=SIDE, copies=2).train
    length: dict[str, Any] = {"steps": 4} if smoke else {"epochs": 8}
    return transfer(Labels(), target=model, data=data, batch_size=64, lr=2e-3, **length).model


def target(source: str, smoke: bool) -> Callable[[], nn.Module]:
    """The encoder under a new head for the ten digits."""

    def build() -> nn.Module:
        model = copy.deepcopy(encoder(source, smoke))
        model.fc = nn.Linear(64, 10)
        return model

    return build


def stream(data: Any, order: Tensor, step: int) -> list[TensorDataset]:
    """The digits, enlarged, in tasks of `step` classes (protocol "B0 Inc-step")."""
    images, labels = data.tensors
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return [TensorDataset(images[rows], labels[rows]) for rows in (torch.isin(labels, c) for c in order.split(step))]


def trial(seed: int, smoke: bool, part: str = "test") -> dict[str, dict[str, float]]:
    """Accuracy over all digits at the end, and its mean over stages, in steps of five and of two classes."""
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    found: dict[str, dict[str, float]] = {arm: {} for arm in ARMS}
    for step, suffix in ((5, ""), (2, " Inc-2")):
        train, test = (stream(getattr(digits(), name), order, step) for name in ("train", part))
        for source, arms in SOURCES.items():
            result = transfer(
                next(iter(arms.values())),
                target=target(source, smoke),
                data=train,
                test=test,
                compare=list(arms.values())[1:],
                seeds=[seed],
                **{**TRAINING, "epochs": 1 if smoke else TRAINING["epochs"]},
            )
            sizes = torch.tensor([len(task) for task in test])
            for name, arm in zip(arms, result.arms, strict=True):
                matrix = measure.result_matrix(arm.runs[0].stages)
                found[name]["last" + suffix] = float((matrix[-1] * sizes).sum() / sizes.sum())
                found[name]["average" + suffix] = measure.average_accuracy(matrix, sizes)
            if source == "clothes":
                found["adapted branch alone"]["last" + suffix] = adapted_alone(result.model, test)
    return found


@torch.no_grad()
def adapted_alone(model: nn.Module, test: list[TensorDataset]) -> float:
    """Accuracy of the second half of ADAM's features by itself."""
    assert isinstance(model, PrototypeModel)
    prototypes = copy.deepcopy(model.prototypes)
    prototypes["sum"] = prototypes["sum"][:, prototypes["sum"].shape[1] // 2 :]
    alone = PrototypeModel([model.encoders[1]], prototypes, 10).eval()
    right = [alone.predict(images) == labels for images, labels in (task.tensors for task in test)]
    return float(torch.cat(right).float().mean())


SOURCES: dict[str, dict[str, Learner]] = {
    "clothes": {
        "ADAM": ADAM(pet="full"),
        "SimpleCIL": SimpleCIL(),
        "FineTune": FineTune(heads="shared"),
        "Replay": Replay(per_class=10, heads="shared"),
    },
    "letters": {"ADAM, letters": ADAM(pet="full"), "SimpleCIL, letters": SimpleCIL()},
    "nothing": {"SimpleCIL, random encoder": SimpleCIL()},
}
ARMS = (*(arm for arms in SOURCES.values() for arm in arms), "adapted branch alone")

PROOF = Study(
    name="simplecil",
    proves=("ADAM", "SimpleCIL", "Replay"),
    data="digits in 2 tasks of 5 (and 5 of 2) classes, 1,078 training images; encoders taught 6,000 clothes or 5,460 "
    "letters, all at 14x14",
    trial=trial,
    arms=ARMS,
    baseline="SimpleCIL",
    metric="last",
    expected="With clothes: SimpleCIL > FineTune + 0.2; ADAM >= SimpleCIL + 0.04, last and average; ADAM >= its "
    "adapted branch alone - 0.01. With letters: SimpleCIL > SimpleCIL of a random encoder + 0.03.",
    seeds=(0, 1, 2),
    notes="With clothes all three statements hold. The one about letters does not: class means of letter features "
    "(0.733) are worse than those of a random encoder (0.831), as are those of clothes (0.760). So this shows that "
    "adapting helps and not that a pretrained encoder generalises; the paper's encoders are far larger. Why letters do "
    "not help is untested; enlarged 8x8 digits are blurred, the letters are sharp. Replay, which may keep ten samples "
    "per class and trains in every task, is best of all (0.951). With two classes at a time adaptation brings 0.03. "
    "SimpleCIL trains nothing and does not depend on the order of classes, so its seeds are one number. Pictures are "
    "14x14 instead of 28x28, for speed.",
)

"""TinyViT: do stored answers about replayed views teach as a live teacher does, and better than mismatched views?"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from proofs.runner import SMOKE_SAMPLES, SMOKE_STEPS, trained
from proofs.small_fashion import CNN_TEACHER, small_fashion
from proofs.study import Numbers, Study
from transfuse import transfer
from transfuse.core.store import ViewStore
from transfuse.datasets import crop_flip_erase
from transfuse.distill import KD, Labels, TinyViT
from transfuse.models import SmallCNN

AUGMENT = partial(crop_flip_erase, pad=3, erase=0.5)
EPOCHS = 6
ARMS = ("stored, 3 classes", "live teacher", "labels", "stored for another view", "stored, 1 class")


class Labelled(Dataset[tuple[Tensor, Tensor]]):
    """The same views with labels."""

    def __init__(self, views: Dataset[dict[str, Tensor]], labels: Tensor):
        self.views, self.labels = views, labels

    def __len__(self) -> int:
        return len(self.views)  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.views[number]["inputs"], self.labels[number % len(self.labels)]


class Mismatched(Dataset[dict[str, Tensor]]):
    """The view of one epoch with what the teacher said about that of the next."""

    def __init__(self, views: Dataset[dict[str, Tensor]], samples: int):
        self.views, self.samples = views, samples

    def __len__(self) -> int:
        return len(self.views)  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        other = self.views[(number + self.samples) % len(self)]
        return {**other, "inputs": self.views[number]["inputs"]}


def trial(seed: int, smoke: bool) -> Mapping[str, Numbers]:
    """Every arm sees every view once."""
    splits, teacher = small_fashion(), trained(CNN_TEACHER, smoke)
    assert isinstance(splits.train, TensorDataset)
    assert isinstance(splits.test, TensorDataset)
    images, labels = (t[:SMOKE_SAMPLES] if smoke else t[:3000] for t in splits.train.tensors)
    test = tuple(t[:SMOKE_SAMPLES] if smoke else t for t in splits.test.tensors)
    training: dict[str, Any] = {"steps": SMOKE_STEPS} if smoke else {"epochs": 1}
    found: dict[str, Numbers] = {}
    with tempfile.TemporaryDirectory() as folder:
        stores = [ViewStore.build(Path(folder) / str(k), teacher, images, AUGMENT, k=k, epochs=EPOCHS) for k in (3, 1)]
        views, one = (store.dataset(images) for store in stores)
        arms: dict[str, tuple[Any, Any, Any]] = {
            "stored, 3 classes": (TinyViT(), None, views),
            "live teacher": (KD(temperature=1.0, alpha=1.0), teacher, Labelled(views, labels)),
            "labels": (Labels(), None, Labelled(views, labels)),
            "stored for another view": (TinyViT(), None, Mismatched(views, len(images))),
            "stored, 1 class": (TinyViT(), None, one),
        }
        for name, (method, source, data) in arms.items():
            began = time.monotonic()
            given = {"seeds": [seed], "batch_size": 64, "lr": 3e-3, **training}
            result = transfer(method, source, lambda: SmallCNN(width=8), data, test=test, **given)
            found[name] = {
                "accuracy": result.arms[0].evaluations[0].metrics["accuracy"],
                "seconds": time.monotonic() - began,
                "bytes_per_view": 4.0 + 4 * {"stored, 1 class": 1}.get(name, 3),
            }
    return found


PROOF = Study(
    name="tinyvit",
    proves=("TinyViT",),
    data="Fashion-MNIST at 14x14, 3,000 images in 6 views each, 10,000 to test; the teacher had 6,000 with labels",
    trial=trial,
    arms=ARMS,
    baseline="labels",
    metric="accuracy",
    expected=(
        "stored answers within 0.7 points of a live teacher on the same views and above labels; answers about another "
        "view below; a single class below three. Time near that of labels"
    ),
    seeds=(0, 1, 2),
    notes=(
        "Stored answers are 1.0 points below a live teacher on the same views, more than the 0.7 that was "
        "expected, and three classes are above one. Answers about another view are far below, so replaying the "
        "views is what matters. But labels beat every teacher: it was trained on whole pictures, and is often "
        "wrong about crops with half of them erased, while labels are right. Time per view is near that of labels "
        "and half of a live teacher's, with other work on the machine."
    ),
)

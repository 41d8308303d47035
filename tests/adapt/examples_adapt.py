"""The least that every method of the family runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from domains import source
from helpers import CLASSES, CNN, Example, images
from torch import Tensor, nn

from transfuse.adapt import DAN, DANN, KTF, LFTL, MCD, ParetoDA, SourceOnly
from transfuse.core.method import Method
from transfuse.models import SphereClassifier


def example(method: Method) -> Example:
    options: dict[str, Any] = {"steps": 6, "batch_size": 8, "lr": 1e-2}
    return Example(method, CNN(norm=True, dropout=0.2), source(), images(24)[0], source(12), options)


def noise_to_images() -> Example:
    """Noise teaches images of which one in two has a label; both are seen whole."""
    noise = torch.randn(15, 8, generator=torch.Generator().manual_seed(2)), torch.arange(15) % CLASSES
    target = SphereClassifier(inputs=16, width=8, classes=CLASSES)
    return Example(KTF(), target, noise, few_labels(), source(12), {"steps": 6, "lr": 1e-2})


def few_labels() -> tuple[Tensor, Tensor]:
    inputs, labels = source()
    labels[::2] = -100
    labels[:CLASSES] = torch.arange(CLASSES)
    return inputs, labels


def pool() -> Example:
    """Three rounds that buy four labels each; the pool's labels answer the oracle."""
    target = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    options: dict[str, Any] = {"epochs": 2, "batch_size": 8, "optimizer": "sgd", "lr": 1e-2}
    return Example(LFTL(rounds=3, ratio=0.1, topk=10, backbone="1"), target, None, source(40), source(12), options)


EXAMPLES: dict[str, Callable[[], Example]] = {
    "SourceOnly": lambda: example(SourceOnly()),
    "DANN": lambda: example(DANN(hidden=8)),
    "DAN": lambda: example(DAN()),
    "KTF": noise_to_images,
    "LFTL": pool,
    "MCD": lambda: example(MCD(repeats=2)),
    "ParetoDA": lambda: example(ParetoDA(hidden=8, held_out=0.4, extractor_lr=1.0)),
}

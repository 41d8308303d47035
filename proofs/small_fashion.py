"""Clothes at 14x14 pixels, and teachers that know them: sized so that a proof takes minutes on two cores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch.utils.data import Dataset, TensorDataset

from proofs.proof import Trained
from transfuse.datasets import Splits, fashion_mnist
from transfuse.models import SmallCNN, resnet8


def small_fashion(size: int = 6000, labels: int | None = None) -> Splits:
    """The first training pictures of Fashion-MNIST, each 2x2 pixels averaged; inputs `(1, 14, 14)`.

    Args:
        size: how many training pictures; smaller sizes are the beginning of larger ones.
        labels: keep this many labels in train, the same for every seed; None keeps all.
    """
    splits = fashion_mnist(size=size, labels=labels)
    return replace(splits, train=_halved(splits.train), validate=_halved(splits.validate), test=_halved(splits.test))


def _halved(data: Dataset[Any] | None) -> TensorDataset:
    assert isinstance(data, TensorDataset)
    images, labels = data.tensors
    return TensorDataset(F.avg_pool2d(images, 2), labels)


CNN_TEACHER = Trained(
    build=lambda: SmallCNN(width=32),
    splits=small_fashion,
    training={"epochs": 12, "batch_size": 64, "lr": 2e-3},
)
"""94,186 parameters, taught all 6,000 labels."""

RESNET_TEACHER = Trained(
    build=lambda: resnet8(channels=1, width=16),
    splits=small_fashion,
    training={"epochs": 8, "batch_size": 64, "lr": 2e-3},
)
"""75,002 parameters, taught all 6,000 labels."""

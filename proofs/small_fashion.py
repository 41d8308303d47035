"""Clothes at 14x14 pixels, and a teacher that knows them: sized so that a proof takes minutes on two cores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch.utils.data import Dataset, TensorDataset

from proofs.proof import Trained
from transfuse.datasets import Splits, fashion_mnist
from transfuse.models import SmallCNN

SIZE = 6000


def small_fashion(labels: int | None = None) -> Splits:
    """The first 6,000 training pictures of Fashion-MNIST, each 2x2 pixels averaged; inputs `(1, 14, 14)`.

    Args:
        labels: keep this many labels in train, the same for every seed; None keeps all.
    """
    splits = fashion_mnist(size=SIZE, labels=labels)
    return replace(
        splits, train=_halved(splits.train), validate=_halved(splits.validate), test=_halved(splits.test)
    )


def _halved(data: Dataset[Any] | None) -> TensorDataset:
    assert isinstance(data, TensorDataset)
    images, labels = data.tensors
    return TensorDataset(F.avg_pool2d(images, 2), labels)


TEACHER = Trained(
    build=lambda: SmallCNN(width=32),
    splits=small_fashion,
    training={"epochs": 12, "batch_size": 64, "lr": 2e-3},
)
"""94,186 parameters; it has all 6,000 labels."""

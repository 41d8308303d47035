"""Convolutions in a row, for maps of 7x7 pixels of clothes of 14x14, and the teacher that two proofs share."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn

from proofs.proof import Trained
from proofs.small_fashion import small_fashion


class PlainCNN(nn.Module):
    """3x3 convolutions with batch normalisation and ReLU, the second with stride 2; global average; a linear head."""

    def __init__(self, *widths: int):
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (inputs, outputs) in enumerate(pairwise((1, *widths)), start=1):
            layers[f"conv{i}"] = nn.Conv2d(inputs, outputs, 3, 2 if i == 2 else 1, padding=1, bias=False)
            layers[f"bn{i}"] = nn.BatchNorm2d(outputs)
            layers[f"relu{i}"] = nn.ReLU()
        self.features = nn.Sequential(layers)
        self.fc = nn.Linear(widths[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images).mean((2, 3)))


PLAIN_TEACHER = Trained(
    build=lambda: PlainCNN(24, 48, 48, 48),
    splits=lambda: small_fashion(size=20_000),
    training={"epochs": 4, "batch_size": 64, "lr": 2e-3, "optimizer": "adam"},
)
"""Four convolutions, taught the labels of 20,000 pictures."""

"""The least that what changes the number of dimensions runs on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers import Example
from torch import Tensor, nn

from transfuse.weights import CrossDConv


class VolumeNet(nn.Module):
    """Two convolutions, normalisation, pooling and a head, for volumes of 5 x 5 x 5."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv1 = nn.Conv3d(1, 3, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm3d(3)
            self.pool = nn.MaxPool3d(2)
            self.conv2 = nn.Conv3d(3, 6, 3, padding=1, groups=3)
            self.point = nn.Conv3d(6, 4, 1)
            self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.conv1(x)).relu())
        return self.fc(self.point(self.conv2(x).relu()).flatten(2).mean(-1))


def labelled(count: int, dimensions: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, *[5] * dimensions, generator=draw), torch.arange(count) % classes


EXAMPLES: dict[str, Callable[[], Example]] = {
    "CrossDConv": lambda: Example(
        CrossDConv(), VolumeNet(), labelled(12, 2, 5), labelled(8, 3, 3), labelled(6, 3, 3, 1),
        {"steps": 4, "batch_size": 4, "lr": 1e-2},
    ),
}  # fmt: skip

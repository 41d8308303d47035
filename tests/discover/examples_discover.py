from __future__ import annotations

from collections.abc import Callable

import torch
from helpers import CNN, Example
from torch import Tensor
from torch.utils.data import TensorDataset

from transfuse.discover import CrKD


def pictures(classes: list[int], count: int = 18, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise around one pattern per class, with 4x4 pixels."""
    draw = torch.Generator().manual_seed(seed)
    patterns = torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(99))
    labels = torch.tensor(classes).repeat(count)[:count]
    return patterns[labels] + 0.3 * torch.randn(count, 1, 4, 4, generator=draw), labels


def discovery() -> dict[str, TensorDataset]:
    return {
        "labelled": TensorDataset(*pictures([0, 1])),
        "unlabelled": TensorDataset(*pictures([2, 3, 4], 24, seed=1)),
    }


EXAMPLES: dict[str, Callable[[], Example]] = {
    "CrKD": lambda: Example(
        CrKD(novel=3, heads=2, hidden=8, width=6, small_views=1),
        CNN(dropout=0.2, norm=True),
        data=discovery(),
        test={
            "old": TensorDataset(*pictures([0, 1], 8, seed=2)),
            "new": TensorDataset(*pictures([2, 3, 4], 9, seed=3)),
        },
        options={"steps": 16, "batch_size": 9, "lr": 0.01},
    )
}

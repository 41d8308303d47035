from __future__ import annotations

from collections.abc import Callable

import torch
from helpers import Example
from torch.utils.data import TensorDataset

from transfuse.search import APQ, ElasticNet


def shapes(count: int = 40, seed: int = 0) -> TensorDataset:
    """Noise around one pattern per class, 8x8 pixels."""
    draw = torch.Generator().manual_seed(seed)
    patterns = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % 3
    return TensorDataset(patterns[labels] + 0.5 * torch.randn(count, 1, 8, 8, generator=draw), labels)


def small_net() -> ElasticNet:
    return ElasticNet(3, stem=4, blocks=2, kernels=(3, 5), widths=(4, 8), depths=(1, 2), bits=(2, 8))


EXAMPLES: dict[str, Callable[[], Example]] = {
    "APQ": lambda: Example(
        APQ(full=4, quantised=3, qat_steps=2, hidden=8, population=6, iterations=2, calibration=1, budget=0.8),
        small_net(),
        data={"train": shapes(), "probe": shapes(12, seed=1)},
        test=shapes(12, seed=2),
        options={"steps": 10, "batch_size": 10, "lr": 0.01},
    )
}

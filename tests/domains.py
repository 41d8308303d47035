"""Two domains of tiny images: labelled source data, and target data whose labels no method may see."""

from __future__ import annotations

from typing import Any

import torch
from helpers import CLASSES, images
from torch import Tensor

from transfuse.core.streams import Data, as_data


def source(count: int = 24) -> tuple[Tensor, Tensor]:
    """Images that all have a label."""
    return images(count, seed=1)[0], torch.arange(count) % CLASSES


def domains(target: Any = None, labelled: Any = None) -> dict[str, Data]:
    """The data of a run, by name."""
    return {
        "data": as_data(images(24) if target is None else target),
        "source": as_data(source() if labelled is None else labelled),
    }

"""Models that say themselves where their weights lie: offloaded to the CPU or to disk, or spread over devices."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn


def places_itself(model: nn.Module) -> bool:
    """Whether a model's own hooks move weights and inputs, so that it must be left where it is (Accelerate's do)."""
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    return spread or any(t.is_meta for t in chain(model.parameters(), model.buffers()))


def move(model: nn.Module, device: torch.device | str) -> nn.Module:
    """The model on a device, unless it places itself."""
    return model if places_itself(model) else model.to(device)


def device_of(model: nn.Module) -> torch.device:
    """Where to put what the model is to read."""
    return next((t.device for t in held(model)), torch.device("cpu"))


def held(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers that are in memory."""
    return (t for t in chain(model.parameters(), model.buffers()) if not t.is_meta)

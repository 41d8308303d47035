"""The least that methods with a mask per task run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import Example
from torch import Tensor, nn

from transfuse.models.transformer import Block
from transfuse.weights import MasterASR, NeuronSpecialization

NEURONS, FRAMES, CLASSES = 10, 7, 5


class FeedForward(nn.Module):
    """Two residual layers `fc1`, ReLU, `fc2`, and a head; tokens `(batch, positions, 4)` are averaged."""

    def __init__(self, seed: int = 0, act: type[nn.Module] = nn.ReLU):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(
                nn.ModuleDict({"fc1": nn.Linear(4, NEURONS), "act": act(), "fc2": nn.Linear(NEURONS, 4)})
                for _ in range(2)
            )
            self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer["fc2"](layer["act"](layer["fc1"](x)))
        if attention_mask is None:
            return self.head(x.mean(1))
        return self.head((x * attention_mask.unsqueeze(-1)).sum(1) / attention_mask.sum(1, keepdim=True))


class Recogniser(nn.Module):
    """Frames `(batch, frames, 4)`, one block of attention, logits of every frame."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inside = nn.Linear(4, 8)
            self.blocks = nn.ModuleList([Block(8, 2)])
            self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def samples(seed: int, count: int = 12) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 4, generator=draw), torch.randint(3, (count,), generator=draw)


def speech(seed: int, count: int = 12) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(1, CLASSES, (count, 3), generator=draw)
    labels[::2, 2] = -100
    return {"inputs": torch.randn(count, FRAMES, 4, generator=draw), "labels": labels}


def specialised(**given: Any) -> Example:
    data = {"a": samples(0), "b": samples(1), "a/validation": samples(2), "b/validation": samples(3)}
    test = {"a": samples(4, 6), "b": samples(5, 6)}
    options = {"steps": 6, "batch_size": 6, "lr": 0.01, "task": "classification"}
    return Example(NeuronSpecialization(70.0, **given), FeedForward(), None, data, test, options)


def recognition(**given: Any) -> Example:
    data = {"one": speech(0), "other": speech(1)}
    options = {"steps": 8, "batch_size": 6, "lr": 0.01, "task": "token-classification"}
    return Example(MasterASR(experts=3, beta=3, gamma=2, **given), Recogniser(), None, data, None, options)


EXAMPLES: dict[str, Callable[[], Example]] = {"NeuronSpecialization": specialised, "MasterASR": recognition}

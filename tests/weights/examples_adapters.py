"""The least that methods of the adapter bank run on: a transformer of two blocks, and adapters of three tasks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from helpers import Example
from torch import Tensor, nn

from transfuse.models.transformer import Block
from transfuse.weights import AdapterFusion, BottleneckAdapter, ScaLearn
from transfuse.weights.adapters import adapted_layers, with_adapters

DIM, DEPTH, TASKS = 8, 2, 3


class Encoder(nn.Module):
    """Tokens, blocks, an average over real tokens, a head."""

    def __init__(self, classes: int = 3, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(11, DIM)
            self.blocks = nn.ModuleList(Block(DIM, 2) for _ in range(DEPTH))
            self.head = nn.Linear(DIM, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        real = attention_mask.bool()
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, real[:, None, None, :])
        return self.head((x * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True))


def tokens(count: int = 12, classes: int = 3, seed: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    mask = (torch.arange(5) < torch.randint(2, 6, (count, 1), generator=draw)).long()
    rows = torch.randint(11, (count, 5), generator=draw)
    labels = torch.randint(classes, (count,), generator=draw)
    return {"input_ids": rows, "attention_mask": mask, "labels": labels}


def source(seed: int, classes: int = 2, backbone: nn.Module | None = None) -> nn.Module:
    """A backbone with adapters that are far from zero."""
    model = copy.deepcopy(Encoder() if backbone is None else backbone)
    model.head = nn.Linear(DIM, classes)
    given = tokens()
    given.pop("labels")
    with torch.random.fork_rng():
        torch.manual_seed(100 + seed)
        adapted = with_adapters(model, "blocks.*.mlp", 2, given)
        for layer in adapted_layers(adapted).values():
            for p in layer.adapters.parameters():
                nn.init.normal_(p, std=0.5)
    return adapted


def sources(count: int = TASKS) -> dict[str, nn.Module]:
    return {f"task{i}": source(i) for i in range(count)}


def example(method: Any, given: Any) -> Example:
    options = {"batch_size": 6, "steps": 4, "lr": 0.01, "task": "classification"}
    return Example(method, Encoder(), given, tokens(), tokens(6, seed=1), options)


EXAMPLES: dict[str, Callable[[], Example]] = {
    "BottleneckAdapter": lambda: example(BottleneckAdapter("blocks.*.mlp", reduction=2), None),
    "AdapterFusion": lambda: example(AdapterFusion(), sources()),
    "ScaLearn": lambda: example(ScaLearn(shared=True), sources()),
}

"""Runs that the tests of the family share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from helpers import CLASSES, CNN, SIDE
from torch import Tensor, nn

from transfuse.core.streams import Data, as_data
from transfuse.core.sync import Sync
from transfuse.core.trainer import Trainer
from transfuse.core.training import Training
from transfuse.federated import Federated, Reply
from transfuse.federated.state import read, write

PLAIN = {"epochs": 1, "batch_size": 64, "optimizer": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
"""One step per epoch on all data of a client, without momentum."""
PLAIN |= {"schedule": "constant", "shuffle": False}


def shards(sizes: tuple[int, ...] = (9, 6, 12), seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Labelled images of clients with different sizes."""
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 1, SIDE, SIDE, generator=draw), torch.randint(CLASSES, (n,), generator=draw)) for n in sizes
    ]


def network(seed: int = 7) -> CNN:
    return CNN(norm=True, dropout=0.2, seed=seed)


def streams(data: Sequence[Any] | None = None) -> dict[str, Data]:
    return {str(i): as_data(shard) for i, shard in enumerate(shards() if data is None else data)}


def trainer(
    method: Federated,
    model: nn.Module | None = None,
    data: Sequence[Any] | None = None,
    folder: Path | None = None,
    listener: Any = None,
    sync: Sync | None = None,
    **training: Any,
) -> Trainer:
    settings = {"epochs": 2, "batch_size": 8, "optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0} | training
    return Trainer(
        method,
        {"target": network() if model is None else model},
        streams(data),
        Training(**({"checkpoint_every": 0.0} | settings)),
        folder=folder,
        listener=listener,
        sync=sync,
    )


def fit(method: Federated, model: nn.Module | None = None, data: Sequence[Any] | None = None, **options: Any) -> Any:
    """What a method deploys."""
    return trainer(method, model, data, **options).fit()


def opened(method: Federated, clients: int, model: nn.Module | None = None, chosen: bool = True) -> Federated:
    """A method whose server waits for answers in its first round."""
    method.open(network() if model is None else model, clients)
    if chosen:
        method.begin(0, seed=0)
    return method


def answer(weights: Tensor, samples: int = 1, **metrics: float) -> Reply:
    return Reply({"weights": weights}, {}, samples, metrics, received=0)


def model_of(state: dict[str, Tensor], like: nn.Module) -> nn.Module:
    write(like, state)
    return like


def vector(model: nn.Module) -> Tensor:
    return read(model)["weights"]


def shard(client: int) -> tuple[Tensor, Tensor]:
    """The data of one client, as a node of a network reads its own."""
    return shards()[client]

"""Every federated method with the least it runs on."""

from __future__ import annotations

from collections.abc import Callable

from federations import network, shards
from helpers import Example
from torch.utils.data import TensorDataset

from transfuse.federated import FedAvg, FedAvgLocal, Federated, FedProx, Local, PGFed, PGFedMo


def example(method: Federated) -> Example:
    """Three clients, the smaller ones with less than a batch, and a network with buffers and dropout."""
    options = {"epochs": 2, "batch_size": 8, "optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0}
    data, test = ([TensorDataset(*shard) for shard in part] for part in (shards(), shards((4, 5, 6), seed=1)))
    return Example(method, network(), data=data, test=test, options=options)


EXAMPLES: dict[str, Callable[[], Example]] = {
    "FedAvg": lambda: example(FedAvg(rounds=2)),
    "FedAvgLocal": lambda: example(FedAvgLocal(rounds=2)),
    "FedProx": lambda: example(FedProx(mu=0.5, rounds=2)),
    "Local": lambda: example(Local(rounds=2, reset=False)),
    "PGFed": lambda: example(PGFed(mu=1.0, rounds=3, fraction=0.7)),
    "PGFedMo": lambda: example(PGFedMo(mu=1.0, rounds=3, reset=False)),
}

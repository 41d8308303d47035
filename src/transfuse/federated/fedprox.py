"""FedProx: clients that do not stray far from the server."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.phases import Batches, Losses, Stage
from transfuse.core.run import Run
from transfuse.federated.base import Federated
from transfuse.federated.client import Client
from transfuse.federated.state import Payload, pieces
from transfuse.losses import Term


class FedProx(Federated):
    """FedAvg whose clients pay for the distance from the model they were sent.

        client i:  min over w of  f_i(w) + mu / 2 * |w - w_server|**2
        server:    w_server = sum_i n_i * w_i / sum_i n_i

    With mu = 0 it is FedAvg. The paper also keeps the answers of clients that did less work; here all do the same.

    Args:
        mu: how much the distance costs, at least 0.
        rounds, fraction, reset, buffer_rule: as for :class:`~transfuse.federated.FedAvg`.

    Source: Li et al., MLSys 2020, arXiv:1812.06127.
    """

    card = Card(
        paper="Li et al., MLSys 2020",
        arxiv="1812.06127",
        carries="weights",
        teacher="clients",
        data="private",
        tasks=("classification", "language-model", "token-classification", "segmentation"),
    )

    def __init__(
        self, mu: float = 0.01, rounds: int = 30, fraction: float = 1.0, reset: bool = True, buffer_rule: str = "mean"
    ):
        super().__init__(rounds, fraction, reset, buffer_rule)
        if mu < 0:
            raise InputError(f"FedProx: mu is {mu}, it must be at least 0")
        self.mu = mu

    def client(self, payload: Payload, memory: Payload) -> Client:
        return _Near(payload, memory, self.reset, self.mu)


class _Near(Client):
    def __init__(self, payload: Payload, memory: Payload, reset: bool, mu: float):
        super().__init__(payload, memory, reset)
        self.mu = mu
        self._sent: list[Tensor] = []

    def stage(self, i: int, run: Run) -> Stage:
        self._sent = pieces(self.payload["weights"], run["target"].parameters())
        return super().stage(i, run)

    def losses(self, batches: Batches, run: Run) -> Losses:
        pairs = zip(run["target"].parameters(), self._sent, strict=True)
        distance = torch.stack([((p - sent) ** 2).sum() for p, sent in pairs]).sum()
        return {**super().losses(batches, run), "proximal": self.mu / 2 * Term(distance)}

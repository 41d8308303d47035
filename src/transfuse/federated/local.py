"""Local: every client on its own, the control of the family."""

from __future__ import annotations

from transfuse.core.card import Card
from transfuse.federated.base import Federated
from transfuse.federated.client import Client
from transfuse.federated.state import Payload


class Local(Federated):
    """Every client trains on its own data alone, for as many rounds; nothing is sent but the initial weights, once.

        w_i = w_i after E epochs of SGD on its own cross-entropy, from w_i, in every round

    What a personalised method gains over it, its clients have learned from each other.

    Args:
        rounds, fraction, reset, buffer_rule: as for :class:`~transfuse.federated.FedAvg`.

    Source: the baseline of every paper on personalised federated learning.
    """

    card = Card(
        paper="training without others",
        carries="nothing",
        teacher="none",
        data="private",
        tasks=("classification", "language-model", "token-classification", "segmentation"),
        control=True,
    )
    personal = True

    def payload(self, client: int) -> Payload:
        return {} if int(self.server["sent"][client]) else super().payload(client)

    def upload(self, state: Payload, client: Client) -> Payload:
        return {}

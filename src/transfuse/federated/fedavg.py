"""FedAvg: the average of what clients learn, again and again."""

from __future__ import annotations

from transfuse.core.card import Card
from transfuse.federated.base import Federated


class FedAvg(Federated):
    """Average the clients' models by their number of samples, and send the average out again.

        client i:  w_i = w after E epochs of SGD on its own cross-entropy, from w
        server:    w = sum_i n_i * w_i / sum_i n_i   over the clients of the round

    Args:
        rounds: how often the server sends and collects.
        fraction: C of the paper, the part of the clients in a round.
        reset: each client's optimiser starts anew in every round.
        buffer_rule: `"mean"` averages running statistics like weights; `"fixed"` leaves the server's as they were.

    Source: McMahan et al., AISTATS 2017, arXiv:1602.05629.
    """

    card = Card(
        paper="McMahan et al., AISTATS 2017",
        arxiv="1602.05629",
        carries="weights",
        teacher="clients",
        data="private",
        tasks=("classification", "language-model", "token-classification", "segmentation"),
    )


class FedAvgLocal(FedAvg):
    """FedAvg, each client served by its own model right after its local epochs, before it is averaged.

        client i is served by  w_i = w after E epochs of SGD on its own cross-entropy, from w

    Training is that of FedAvg to the bit; only what is deployed differs: a client that never took part has the
    server's model, another one that of its last round.

    Source: McMahan et al., AISTATS 2017, arXiv:1602.05629, for the training; a usual baseline of personalised methods.
    """

    card = Card(
        paper="McMahan et al., AISTATS 2017; local epochs before deployment",
        arxiv="1602.05629",
        carries="weights",
        teacher="clients",
        data="private",
        tasks=("classification", "language-model", "token-classification", "segmentation"),
    )
    personal = True

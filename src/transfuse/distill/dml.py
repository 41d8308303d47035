"""DML: deep mutual learning."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.labels import labels_term
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.distill.online import Online
from transfuse.losses import Term, kl_divergence


class DML(Online):
    """Train networks together, each taught by the average divergence from all the others.

        loss_k = CE(labels, net_k) + T**2 / (K - 1) * sum over l != k of KL(softmax(net_l / T) || softmax(net_k / T))

    Means over samples; the other networks' probabilities are constants in `loss_k`. The sources are trained along,
    starting from the weights they come with; no one needs to know anything beforehand.

    Args:
        temperature: T > 0; the paper has 1.

    Raises:
        VocabularyError: the networks count different classes.
        InputError: two networks share parameters, or one cannot learn.

    Source: Zhang, Xiang, Hospedales & Lu, CVPR 2018, arXiv:1706.00384.
    """

    card = Card(
        paper="Zhang, Xiang, Hospedales & Lu, CVPR 2018",
        arxiv="1706.00384",
        carries="outputs",
        teacher="full",
        data="labelled",
        tasks=("classification", "language-model", "token-classification", "segmentation"),
    )

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        if temperature <= 0:
            raise InputError(f"DML: temperature is {temperature}, it must be positive")
        self.temperature = temperature

    def loss(self, role: str, networks: Mapping[str, Outputs], batch: Batch, clock: Clock) -> Losses:
        own = networks[role].logits
        peers = [outputs.logits for name, outputs in networks.items() if name != role]
        mutual = torch.stack([kl_divergence(own, peer, temperature=self.temperature) for peer in peers])
        return {"labels": labels_term(own, batch), "mutual": Term.of(mutual.mean(0), batch.mask)}

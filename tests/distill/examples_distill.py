"""The least that every method of the family runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import CNN, Example, images
from torch import nn

from transfuse.core.method import Method
from transfuse.distill import BDKD, CATKD, DML, KD, ORC, RKD, SLA, TAID, AttentionTransfer, Hints, Labels, TopKD, WCoRD


def example(method: Method, *sources: CNN, target: CNN | None = None, labelled: bool = False) -> Example:
    """Images of which one in three has no label, unless all must have one."""
    inputs, labels = images(24)
    data = inputs, labels.where(labels != -100, torch.arange(24) % 3) if labelled else labels
    options: dict[str, Any] = {"steps": 6, "batch_size": 8, "lr": 1e-2}
    source = None if not sources else sources[0] if len(sources) == 1 else list(sources)
    return Example(method, target or CNN(norm=True, dropout=0.2), source, data, images(12, seed=1), options)


def peer(width: int = 6, seed: int = 1, classes: int = 3) -> CNN:
    model = CNN(width=width, norm=True, seed=seed)
    if classes != 3:
        model.fc = nn.Linear(2 * width, classes)
    return model


EXAMPLES: dict[str, Callable[[], Example]] = {
    "Labels": lambda: example(Labels()),
    "KD": lambda: example(KD(), peer()),
    "Hints": lambda: example(Hints("layer2", "layer2"), peer()),
    "AttentionTransfer": lambda: example(AttentionTransfer("layer2", "layer2"), peer()),
    "RKD": lambda: example(RKD(), peer()),
    "CATKD": lambda: example(CATKD(drop_bias=True), peer()),
    "TopKD": lambda: example(TopKD(), peer(classes=8), target=peer(4, 0, classes=8)),
    "WCoRD": lambda: example(WCoRD(width=8, calibrate=True), peer()),
    "DML": lambda: example(DML(), peer(8), peer(6, 2), labelled=True),
    "TAID": lambda: example(TAID(rate=0.1), peer()),
    "BDKD": lambda: example(BDKD(), peer(8), labelled=True),
    "ORC": lambda: example(ORC(), peer(8), peer(6, 2), peer(5, 3), labelled=True),
    "SLA": lambda: example(SLA(inference="aggregated"), labelled=True),
}

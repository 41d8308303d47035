"""ParetoDA and its relatives: do labels of upright clothes teach a network about clothes that are turned?"""

from __future__ import annotations

from functools import partial
from typing import Any

from proofs.proof import Proof
from transfuse.adapt import DAN, DANN, MCD, ParetoDA, SourceOnly
from transfuse.datasets import rotated_fashion
from transfuse.models import SmallCNN

UPDATES = 250
SETTINGS: dict[str, Any] = {"hidden": 64, "warmup": UPDATES / 10, "extractor_lr": 1.0}
"""The network is not pretrained, and its warm start is that of DANN's default gamma for so many updates."""
TURNED = partial(rotated_fashion, angle=40.0, source=4000, target=4000, side=14)
TRAINING: dict[str, Any] = {
    "steps": UPDATES,
    "batch_size": 32,
    "optimizer": "sgd",
    "lr": 0.05,
    "weight_decay": 1e-3,
    "schedule": "inverse",
}

PROOF = Proof(
    name="paretoda",
    proves=("ParetoDA", "DANN", "DAN", "MCD"),
    data="Fashion-MNIST at 14x14: 4,000 labelled upright pictures, 4,000 others turned by 40 degrees without labels",
    splits=TURNED,
    source=lambda: TURNED().source,
    target=lambda: SmallCNN(width=8),
    method=ParetoDA(mode="auto", **SETTINGS),
    compare=(
        SourceOnly(),
        0.5 * DANN(hidden=64),
        ParetoDA(mode="fixed", **SETTINGS),
        ParetoDA(mode="descent", **SETTINGS),
        MCD(),
        DAN(),
        "shuffled source",
    ),
    baseline="SourceOnly()",
    training=TRAINING,
    expected="ParetoDA > source only; ParetoDA >= DANN with weights (1, 1); shuffled source far below source only",
)

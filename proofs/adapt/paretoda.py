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
    notes="As expected over source only and DANN. But the linear programme shows no gain: equal weights of the same "
    "three objectives (mode='fixed') are 4 points better in the mean, and in each of the three seeds; their worst seed "
    "has 0.541, that of ParetoDA 0.516 and that of descent 0.480. So the gain over DANN comes from the third "
    "objective, the certainty and balance of refined target predictions, and not from the direction. Untested guess: "
    "with 250 updates from untrained weights the loss of step length, not conflict, decides. 250 updates instead of "
    "the sheet's 400 to 800, for time; one validation run with 400 had the same order (seed 100: source only 0.323, "
    "DANN 0.478, auto 0.601, descent 0.613, fixed 0.627). Settings are the sheet's but for the learning rate, the "
    "warm start (a tenth of the updates) and the extractor's rate (1, as it is not pretrained). Three seeds are few: "
    "DAN and MCD vary by more than 0.04.",
)

"""LFTL: does a source-trained network learn a turned, noisy domain from forty labels that it buys?"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import Subset, TensorDataset

from proofs.study import Study
from transfuse import transfer
from transfuse.adapt import LFTL
from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.datasets import rotated_fashion
from transfuse.datasets.pictures import noisy
from transfuse.distill import Labels
from transfuse.losses import IGNORE, Term, cross_entropy
from transfuse.models.cnn import convolution

SOURCE = {"epochs": 5, "batch_size": 64, "lr": 2e-3}
TRAINING = {"epochs": 3, "batch_size": 64, "optimizer": "sgd", "momentum": 0.9, "lr": 5e-3, "weight_decay": 1e-3}
FULL = partial(LFTL, rounds=4, ratio=0.0025, topk=200, backbone="backbone")
ARMS = {
    "LFTL": FULL(),
    "random queries": FULL(query="random"),
    "margin queries": FULL(contrast=0.0, balance=0.0),
    "without persistence": FULL(persistence=0.0),
    "labels only, random queries": FULL(query="random", information=0.0, persistence=0.0, mixup=0.0),
}


class Smoothed(Labels):
    """Cross-entropy with smoothed labels, as the sources of such transfers are trained."""

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        values = cross_entropy(student.logits, batch.labels, label_smoothing=0.1)
        return {"labels": Term.of(values, batch.labels != IGNORE, "labelled")}


def network() -> nn.Module:
    """Backbone, bottleneck with batch normalisation, weight-normalised classifier."""
    blocks = convolution(1, 8), nn.AvgPool2d(2), convolution(8, 16), nn.AvgPool2d(2), nn.Flatten()
    bottleneck = nn.Sequential(nn.Linear(16 * 3 * 3, 64), nn.BatchNorm1d(64))
    head = weight_norm(nn.Linear(64, 10))
    return nn.Sequential(OrderedDict(backbone=nn.Sequential(*blocks), bottleneck=bottleneck, head=head))


def trial(seed: int, smoke: bool) -> Mapping[str, Mapping[str, float]]:
    splits = rotated_fashion(angle=28.65, source=6000, target=4000, side=14)
    assert isinstance(splits.train, TensorDataset)
    assert isinstance(splits.test, TensorDataset)
    pool, new = (
        TensorDataset(noisy(part.tensors[0], 0.1, seed=k), part.tensors[1])
        for k, part in enumerate((splits.train, splits.test))
    )
    held_out = Subset(new, range(128 if smoke else 2000))
    training: dict[str, Any] = {"epochs": None, "steps": 3} if smoke else {}
    source = transfer(
        Smoothed(), target=network, data=splits.source, test=held_out, seeds=[seed], **{**SOURCE, **training}
    )
    method, *others = ARMS.values()
    result = transfer(
        method,
        target=source.model,
        data=pool,
        test=held_out,
        compare=others,
        seeds=[seed],
        **{**TRAINING, **training},
    )
    before = source.arms[0].runs[0].evaluation
    assert before is not None
    found = {"source only": {"accuracy": before.metrics["accuracy"]}}
    for name, arm in zip(ARMS, result.arms, strict=True):
        rounds = [row["test"] for row in arm.runs[0].stages]
        found[name] = {"accuracy": rounds[-1]} | {f"round {i}": value for i, value in enumerate(rounds, start=1)}
    return found


PROOF = Study(
    name="lftl",
    proves=("LFTL",),
    data="Fashion-MNIST at 14x14: 6,000 upright labelled images for the source; a pool of 4,000 others, turned by half "
    "a radian, with noise of 0.1, of which 4 rounds buy 10 labels each; 2,000 official test images, changed alike",
    trial=trial,
    arms=(*ARMS, "source only"),
    baseline="labels only, random queries",
    metric="accuracy",
    expected="LFTL > labels only, random queries > source only, and more after round 4 than after round 1; its sampler "
    "over random or margin queries and persistence on or off are reported: the sheet's pilot found no clear difference",
    notes="Accuracy rises from round to round in the mean (0.524, 0.568, 0.601, 0.627), and LFTL is above training "
    "on labels alone with all three seeds (+0.066, +0.004, +0.035), but the interval over three seeds includes "
    "0. What shows is the losses: on the same random queries, all terms together are 0.05 to 0.09 above labels "
    "alone with every seed. What does not show, as in the sheet's own pilot, is the sampler: its queries are "
    "0.04 below random ones in the mean, within the noise over seeds. With seed 1 its first ten labels leave "
    "the accuracy at 0.36, and with seed 2 those of margin sampling do: ten labels may miss whole classes, "
    "while information maximisation spreads the samples over all of them (a guess, not tested). Persistence "
    "adds 0.16 with that seed and little or nothing with the others.",
)

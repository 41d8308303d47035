"""CATKD: does a student learn of classes of which it never sees a picture?

Every picture has a map for every class, also for those it does not show. The student trains on pictures of eight of
the ten classes and is tested on pictures of the other two.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.utils.data import TensorDataset

from proofs.distill._plain import PLAIN_TEACHER, PlainCNN
from proofs.small_fashion import small_fashion
from proofs.study import Study
from transfuse import transfer
from transfuse.distill import CATKD, KD, Labels

UNSEEN = (0, 9)
ARMS = {
    "pure CAT, normalised": CATKD(beta=50, labels=0, normalise=True, drop_bias=True),
    "pure CAT": CATKD(labels=0, drop_bias=True),
    "KD": KD(),
    "labels": Labels(),
}


@cache
def teacher(smoke: bool) -> nn.Module:
    length = {"epochs": None, "steps": 4} if smoke else {}
    training = {**PLAIN_TEACHER.training, **length}
    return transfer(Labels(), target=PLAIN_TEACHER.build, data=PLAIN_TEACHER.splits().train, **training).model


def trial(seed: int, smoke: bool) -> dict[str, dict[str, float]]:
    splits = small_fashion(size=2000)
    (train_images, train_labels), (images, labels) = splits.train.tensors, splits.test.tensors
    seen = ~torch.isin(train_labels, torch.tensor(UNSEEN))
    hidden = torch.isin(labels, torch.tensor(UNSEEN))
    length = {"steps": 4} if smoke else {"epochs": 20}
    found = {}
    for arm, method in ARMS.items():
        model = transfer(
            method,
            source=teacher(smoke),
            target=lambda: PlainCNN(8, 16, 16),
            data=TensorDataset(train_images[seen], train_labels[seen]),
            seeds=[seed],
            batch_size=64,
            lr=5e-3,
            optimizer="adam",
            **length,
        ).model
        with torch.no_grad():
            correct = torch.cat([model(part) for part in images.split(1000)]).argmax(1) == labels
        found[arm] = {
            "accuracy on unseen classes": correct[hidden].float().mean().item(),
            "accuracy on seen classes": correct[~hidden].float().mean().item(),
        }
    return found


PROOF = Study(
    name="catkd_unseen",
    proves=("CATKD",),
    data="Fashion-MNIST at 14x14, the images of eight classes among 2,000; the teacher had 20,000 of all ten",
    trial=trial,
    arms=tuple(ARMS),
    baseline="labels",
    metric="accuracy on unseen classes",
    expected=(
        "normalised pure CAT, 10 % or more; labels, 1 % or less; maps that are not normalised teach a student this "
        "small no unseen class"
    ),
    notes=(
        "As expected, with every seed. The two forms trade places: normalised maps carry what the student has never "
        "seen, and cost it a tenth or more of its accuracy on the classes that it has; plain maps keep the latter and "
        "carry nothing of the former. KD teaches no unseen class either."
    ),
)

"""SLA: with few labels, is it better to tell which class and which rotation a picture is than to call all the same?"""

from __future__ import annotations

from dataclasses import replace

from torch.utils.data import TensorDataset

from proofs.proof import Proof
from transfuse.datasets import Splits, fashion_mnist
from transfuse.distill import SLA
from transfuse.losses import IGNORE
from transfuse.models import MLP


def few_shot(splits: Splits) -> Splits:
    """Without the training pictures whose labels are hidden."""
    assert isinstance(splits.train, TensorDataset)
    images, labels = splits.train.tensors
    known = labels != IGNORE
    return replace(splits, train=TensorDataset(images[known], labels[known]))


PROOF = Proof(
    name="sla",
    proves=("SLA",),
    data="Fashion-MNIST, 50 training images of each class with labels, 10,000 to test",
    splits=lambda: few_shot(fashion_mnist(labels=500)),
    source=None,
    target=lambda: MLP(784, [128]),
    method=SLA("SLA", inference="aggregated"),
    compare=("scratch", SLA(), SLA("SLA"), SLA("DA"), SLA("MT")),
    baseline="scratch",
    training={
        "epochs": 60,
        "batch_size": 32,
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": 0.0,
        "schedule": "constant",
    },
    expected=(
        "with aggregated inference SLA > scratch, > SLA with a single view, and > the same labels for all views (DA) "
        "by 3 points or more; the distilled head within half a point of the interval between single and aggregated"
    ),
    seeds=(0, 1, 2, 3, 4),
    notes=(
        "Half as expected. The same labels for all views (DA) and two tasks (MT) cost 6 points, and aggregated SLA "
        "is 5 points better than both, as in the paper; aggregated is 0.2 points better than a single view, within "
        "its interval, and the distilled single head is 0.4 points above the better of the two. But no variant "
        "beats scratch at the same number of updates, though each saw four times the pictures: SLA is 0.9 points "
        "behind. NLL is better than scratch's (0.79 against 0.86). It is no matter of training time: on validation "
        "data with seed 100, three times the updates left aggregated SLA at 0.784 and raised scratch to 0.790; nor "
        "are the views not learned: the joint head tells 93 % of the rotations of held-out pictures. What we "
        "suspect and did not test: a perceptron shares nothing between a picture and its rotation, so its 128 "
        "units are spent on 40 classes. A convolutional network, as in the paper, was not run. Settings are those "
        "of the sheet, with no tuning."
    ),
)

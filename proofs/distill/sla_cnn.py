"""SLA where the paper uses it: does a small convolutional network with few labels gain more than a perceptron does?"""

from __future__ import annotations

from proofs.distill.sla import few_shot
from proofs.proof import Proof
from proofs.small_fashion import small_fashion
from transfuse.distill import SLA
from transfuse.models import SmallCNN

PROOF = Proof(
    name="sla_cnn",
    proves=("SLA",),
    data="Fashion-MNIST at 14x14, 50 training images of each class with labels, 10,000 to test",
    splits=lambda: few_shot(small_fashion(size=55_000, labels=500)),
    source=None,
    target=lambda: SmallCNN(width=8),
    method=SLA("SLA", inference="aggregated"),
    compare=("scratch", SLA(), SLA("SLA"), SLA("DA")),
    baseline="scratch",
    training={"epochs": 60, "batch_size": 32, "lr": 2e-3},
    expected="with aggregated inference SLA > scratch by a point or more, > SLA with a single view, and > DA",
)

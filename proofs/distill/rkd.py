"""RKD: do the teacher's distances and angles between samples teach a student, beside labels and beside KD?"""

from __future__ import annotations

from proofs.proof import Proof
from proofs.small_fashion import CNN_TEACHER, small_fashion
from transfuse.distill import KD, RKD, Labels
from transfuse.models import resnet8

PROOF = Proof(
    name="rkd",
    proves=("RKD",),
    data="Fashion-MNIST at 14x14, 6,000 training images, 200 labels; the teacher had all",
    splits=lambda: small_fashion(labels=200),
    source=CNN_TEACHER,
    target=lambda: resnet8(channels=1, width=4),
    method=Labels() + RKD(),
    compare=("scratch", KD(), KD() + RKD(), "shuffled teacher"),
    baseline="scratch",
    training={"epochs": 6, "batch_size": 64, "lr": 5e-3},
    expected="teacher > KD with RKD > KD > labels with RKD > scratch",
)

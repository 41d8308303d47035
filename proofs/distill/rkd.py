"""RKD: do the teacher's distances and angles between samples add to its outputs?"""

from __future__ import annotations

from proofs.proof import Proof
from proofs.small_fashion import TEACHER, small_fashion
from transfuse.distill import KD, RKD, Labels
from transfuse.models import resnet8

PROOF = Proof(
    name="rkd",
    proves=("RKD",),
    data="Fashion-MNIST at 14x14, 6,000 training images, the student has 200 labels",
    splits=lambda: small_fashion(labels=200),
    source=TEACHER,
    target=lambda: resnet8(channels=1, width=4),
    method=KD() + RKD(),
    compare=(KD(), Labels() + RKD(), "scratch", "shuffled teacher"),
    baseline="KD()",
    training={"epochs": 10, "batch_size": 64, "lr": 5e-3},
    expected="teacher > KD with RKD > KD > labels with RKD > scratch",
)

"""Hints: does a thin, deep student become better when its middle layer is trained on the teacher's first?"""

from __future__ import annotations

from proofs.proof import Proof
from proofs.small_fashion import TEACHER, small_fashion
from transfuse import Then
from transfuse.distill import KD, Hints
from transfuse.models import ResNet

PROOF = Proof(
    name="hints",
    proves=("Hints",),
    data="Fashion-MNIST at 14x14, 6,000 training images, the student has 200 labels",
    splits=lambda: small_fashion(labels=200),
    source=TEACHER,
    target=lambda: ResNet(depth=14, channels=1, width=4),
    method=Then(Hints("layer2", "layer2"), KD(), shares=(0.3, 0.7)),
    compare=(KD(), KD() + Hints("layer2", "layer2"), "scratch", "shuffled teacher"),
    baseline="KD()",
    training={"epochs": 8, "batch_size": 64, "lr": 5e-3},
    expected="teacher > hints first, then KD > KD alone > scratch > shuffled teacher",
)

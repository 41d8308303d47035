"""Hints: does a thin, deep student become better when its lower half first learns the middle of the teacher?"""

from __future__ import annotations

from proofs.proof import Proof
from proofs.small_fashion import CNN_TEACHER, small_fashion
from transfuse import Then
from transfuse.distill import KD, Hints
from transfuse.models import ResNet

MIDDLE = Hints("layer2", "layer2")

PROOF = Proof(
    name="hints",
    proves=("Hints",),
    data="Fashion-MNIST at 14x14, 500 training images with labels; the teacher had 6,000",
    splits=lambda: small_fashion(size=500),
    source=CNN_TEACHER,
    target=lambda: ResNet(depth=14, channels=1, width=4),
    method=Then(MIDDLE, KD(), shares=(0.3, 0.7)),
    compare=(KD(), KD() + MIDDLE, "scratch", "shuffled teacher"),
    baseline="KD()",
    training={"steps": 600, "batch_size": 64, "lr": 5e-3},
    expected="teacher > hints first, then KD > KD alone > scratch",
    notes=(
        "Not as in the paper: at the same number of updates, hints first are no better than KD alone. An earlier "
        "run, which cut the same data into other batches, had them behind by 0.014 with an interval below zero; on "
        "validation data, with another teacher and seeds 100 and 101, they were ahead by 0.010. So three seeds and "
        "one teacher do not settle the sign. That hints take three tenths of the updates from KD explains "
        "little: KD alone with 420 instead of 600 updates lost 0.004 there. What we suspect and did not "
        "test: the paper's deep students were hard to train, this one has batch normalisation and shortcuts, "
        "which came later, and needs no help. The data was chosen by validation with one seed, where hints had "
        "trailed KD with 200 labels among 6,000 images, too."
    ),
)

"""AttentionTransfer: does a student that looks where its teacher looks need fewer labels?"""

from __future__ import annotations

from proofs.proof import Proof
from proofs.small_fashion import TEACHER, small_fashion
from transfuse.distill import KD, AttentionTransfer, Labels
from transfuse.models import resnet8

ATTENTION = AttentionTransfer("layer2", "layer2") + AttentionTransfer("layer3", "layer3")

PROOF = Proof(
    name="attention_transfer",
    proves=("AttentionTransfer",),
    data="Fashion-MNIST at 14x14, 6,000 training images, the student has 200 labels",
    splits=lambda: small_fashion(labels=200),
    source=TEACHER,
    target=lambda: resnet8(channels=1, width=4),
    method=Labels() + ATTENTION,
    compare=("scratch", KD(), KD() + ATTENTION, "shuffled teacher"),
    baseline="scratch",
    training={"epochs": 10, "batch_size": 64, "lr": 5e-3},
    expected="teacher > KD with attention > KD and labels with attention, in no fixed order > scratch",
)

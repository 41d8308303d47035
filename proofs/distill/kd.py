"""KD: does a small student with 50 labels learn from a teacher over unlabelled digits?"""

from __future__ import annotations

from proofs.proof import Proof, Trained
from transfuse.datasets import digits
from transfuse.distill import KD
from transfuse.models import MLP

PROOF = Proof(
    name="kd",
    proves=("KD",),
    data="digits, 1,078 training images, 50 labels; the teacher had all",
    splits=lambda: digits(labels=50),
    source=Trained(
        build=lambda: MLP(hidden=(200, 200)),
        splits=digits,
        training={"epochs": 30, "batch_size": 64, "lr": 2e-3},
    ),
    target=lambda: MLP(hidden=(20,)),
    method=KD(temperature=4),
    compare=("scratch", "shuffled teacher"),
    baseline="scratch",
    training={"epochs": 60, "batch_size": 64, "lr": 1e-2},
    seeds=(0, 1, 2, 3, 4),
    expected="teacher > KD > scratch > shuffled teacher",
    notes="As expected. The same 50 labels serve all seeds, so the interval does not cover the choice of labels.",
)

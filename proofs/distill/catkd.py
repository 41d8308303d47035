"""CATKD: does a student with few pictures become better when it looks for each class where the teacher looks?"""

from __future__ import annotations

from proofs.distill._plain import PLAIN_TEACHER, PlainCNN
from proofs.proof import Proof
from proofs.small_fashion import small_fashion
from transfuse.distill import CATKD, KD

PROOF = Proof(
    name="catkd",
    proves=("CATKD",),
    data="Fashion-MNIST at 14x14, 2,000 training images with labels; the teacher had 20,000",
    splits=lambda: small_fashion(size=2000),
    source=PLAIN_TEACHER,
    target=lambda: PlainCNN(8, 16, 16),
    method=CATKD(beta=0.3),
    # Pure CAT, the third, reads no label.
    compare=("scratch", KD(), CATKD(labels=0, drop_bias=True), "shuffled teacher"),
    baseline="scratch",
    training={"epochs": 20, "batch_size": 64, "lr": 5e-3, "optimizer": "adam"},
    expected=(
        "teacher > CAT-KD > scratch, by about a point; CAT-KD > shuffled teacher; pure CAT, without a label, at most "
        "1.5 points behind scratch"
    ),
    notes=(
        "In the order expected with every seed, but by half a point, and three seeds cannot exclude zero. Pure CAT "
        "comes within a point of scratch without a label, and maps of other images harm: it matters where the teacher "
        "looks in this very image. Beta is the sheet's, not tuned: with seeds 100 and 101, on validation data, 0.3, 1 "
        "and 3 differed by less than the seeds did. The maps are 7x7 positions of centred clothes, where little has to "
        "be found; we suspect, and did not test, that this is why the gain is small."
    ),
)

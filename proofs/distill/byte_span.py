"""ByteSpanKD: does a student of byte pairs learn from the likelihoods that a teacher of bytes gives its tokens?"""

from __future__ import annotations

from collections.abc import Mapping

from proofs.distill._paired import DATA, compared, names
from proofs.study import Numbers, Study
from transfuse.core.method import Method
from transfuse.distill import ByteSpanKD, SortedLogitsKD

METHOD = ByteSpanKD(alpha=0.5)
OTHERS: tuple[str | Method, ...] = (ByteSpanKD(), SortedLogitsKD(), "shuffled teacher", "scratch")


def trial(seed: int, smoke: bool) -> Mapping[str, Numbers]:
    return compared(seed, smoke, METHOD, *OTHERS)


PROOF = Study(
    name="byte_span",
    proves=("ByteSpanKD",),
    data=DATA,
    trial=trial,
    arms=names(METHOD, OTHERS),
    baseline="scratch",
    metric="nll",
    higher_is_better=False,
    expected=(
        "ByteSpanKD with labels below scratch and below SortedLogitsKD, and the shuffled teacher above scratch. "
        "Without labels it learns as well (the nll falls far below that of a uniform guess, 6.24), though not "
        "necessarily as far: of each token it is told one number"
    ),
    seeds=(0, 1, 2),
    notes=(
        "The order is as expected, but the gain over scratch (0.03 nats per token) is smaller than three seeds can "
        "tell from none. Without any label the student comes within 0.07 of scratch: the likelihoods alone teach it "
        "nearly what labels do. In 300 updates the student is far from the teacher, so labels still say most. The "
        "seconds of an arm are those of all arms together"
    ),
)

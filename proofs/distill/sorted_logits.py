"""SortedLogitsKD: does it help to be as sure as a teacher with other tokens is, without being told of what?"""

from __future__ import annotations

from collections.abc import Mapping

from proofs.distill._paired import DATA, compared, names
from proofs.study import Numbers, Study
from transfuse.distill import SortedLogitsKD

METHOD, OTHERS = SortedLogitsKD(), ("shuffled teacher", "scratch")


def trial(seed: int, smoke: bool) -> Mapping[str, Numbers]:
    return compared(seed, smoke, METHOD, *OTHERS)


PROOF = Study(
    name="sorted_logits",
    proves=("SortedLogitsKD",),
    data=DATA,
    trial=trial,
    arms=names(METHOD, OTHERS),
    baseline="scratch",
    metric="nll",
    higher_is_better=False,
    expected=(
        "The paper has it below labels alone; here the k-th token of the student is set against the k-th byte of the "
        "teacher, which is a place some two thirds further back, so little is expected: within 1 % of scratch, and no "
        "better than the shuffled teacher"
    ),
    seeds=(0, 1, 2),
    notes=(
        "Worse than expected: it does not stay near scratch but costs 0.7 nats per token, and the teacher's text does "
        "not matter, for the shuffled teacher does the same harm. A teacher of bytes is sure of most bytes, a "
        "student of byte pairs cannot be as sure of its tokens, and it is drawn to be so at places where it does not "
        "know. The paper's pairs are subword models of similar vocabularies, answering short questions; across "
        "tokenizers as different as these use ByteSpanKD"
    ),
)

"""TAID: does a target that moves from the student to the teacher teach a small language model better?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from proofs.runner import trained
from proofs.small_text import TEACHER, small_text, student, trained_arms, windows
from proofs.study import Numbers, Study
from transfuse.core.batch import Batch, align_tokens
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.outputs import Outputs, call, find_logits
from transfuse.core.phases import Losses
from transfuse.core.teaching import teach
from transfuse.distill import KD, TAID, Distillation, Labels
from transfuse.losses import Divergence, entropy

METHOD, LINEAR, FORWARD = TAID(), TAID(rate=0.0), KD(temperature=1.0, alpha=1.0)


class ReverseKL(Distillation):
    """KL(student || teacher) alone, a baseline of this proof."""

    card = Card(paper="baseline", control=True, tasks=("language-model",))

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        return teach("reverse", Divergence("reverse"), student, teacher, batch)


REVERSE = ReverseKL()


@torch.no_grad()
def entropy_gap(model: nn.Module, teacher: nn.Module, text: Tensor) -> float:
    """Mean entropy of the model's predictions over the teacher's, in nats per byte."""
    gaps = []
    for inputs in text.split(128):
        mask = align_tokens(Batch(inputs=inputs)).mask
        ours, theirs = (entropy(find_logits(call(m.eval(), inputs))) for m in (model, teacher))
        gaps.append((ours - theirs)[mask])
    return float(torch.cat(gaps).mean())


def trial(seed: int, smoke: bool) -> Mapping[str, Numbers]:
    """Every arm has the same student and the same order of the data."""
    teacher, (train, test) = trained(TEACHER, smoke), windows(small_text(), smoke)

    def more(model: nn.Module) -> dict[str, float]:
        return {"entropy_gap": entropy_gap(model, teacher, test)}

    return trained_arms((METHOD, LINEAR, FORWARD, REVERSE, Labels()), teacher, student, train, test, seed, smoke, more)


PROOF = Study(
    name="taid",
    proves=("TAID",),
    data="source code of CPython's library in windows of 64 bytes; 12,800 windows to train on, 1,489 to test",
    trial=trial,
    arms=(repr(METHOD), repr(LINEAR), repr(FORWARD), repr(REVERSE), "scratch"),
    baseline="scratch",
    metric="nll",
    higher_is_better=False,
    expected=(
        "NLL: every distilled student below scratch; TAID not above reverse KL and within 1% of forward KL; the "
        "entropy gap of reverse KL is the most negative. That TAID beats forward KL may be invisible at this size"
    ),
    seeds=(0, 1, 2),
    notes=(
        "Not as expected, and with a reason: 400 updates are few, the student is far from having learnt what it could, "
        "and a target that is mostly the student's own pulls less. TAID ends 0.05 above scratch and 0.13 above "
        "forward KL; t reaches the teacher only with the last update. The adaptive schedule and the linear one are the "
        "same here: a step of rate 5e-4 is smaller than the 1.5e-3 by which the linear floor rises per update, so the "
        "floor decides. The paper trains for far longer. Reverse KL is worst in NLL, as expected; its entropy gap is "
        "the lowest of all arms in two of three seeds; all gaps are positive, for every student is less sure than the "
        "teacher."
    ),
)

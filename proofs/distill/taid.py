"""TAID: does a target that moves from the student to the teacher teach a small language model better?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from proofs.runner import SMOKE_SAMPLES, SMOKE_STEPS, trained
from proofs.small_text import TEACHER, TRAINING, small_text, student
from proofs.study import Numbers, Study
from transfuse import transfer
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
def entropy_gap(model: nn.Module, teacher: nn.Module, windows: Tensor) -> float:
    """Mean entropy of the model's predictions over the teacher's, in nats per byte."""
    gaps = []
    for inputs in windows.split(128):
        mask = align_tokens(Batch(inputs=inputs)).mask
        ours, theirs = (entropy(find_logits(call(m.eval(), inputs))) for m in (model, teacher))
        gaps.append((ours - theirs)[mask])
    return float(torch.cat(gaps).mean())


def trial(seed: int, smoke: bool) -> Mapping[str, Numbers]:
    """Every arm has the same student and the same order of the data."""
    splits, teacher = small_text(), trained(TEACHER, smoke)
    assert isinstance(splits.test, TensorDataset)
    windows = splits.test.tensors[0][:SMOKE_SAMPLES] if smoke else splits.test.tensors[0]
    training: dict[str, Any] = {**TRAINING, "steps": SMOKE_STEPS} if smoke else TRAINING
    given = {"data": splits.train, "test": windows, "seeds": [seed], "task": "language-model", **training}
    found = {}
    for arm in (METHOD, LINEAR, FORWARD, REVERSE, Labels()):
        result = transfer(arm, teacher, student, **given)
        gap = entropy_gap(result.model, teacher, windows)
        name = "scratch" if isinstance(arm, Labels) else repr(arm)
        found[name] = {**result.arms[0].evaluations[0].metrics, "entropy_gap": gap}
    return found


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
)

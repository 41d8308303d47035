"""Swing: does a student of a teacher that knows a secret learn the text, and not the secret?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from proofs.proof import Trained
from proofs.runner import trained
from proofs.small_text import CONTEXT, small_text, student, trained_arms, windows
from proofs.study import Numbers, Study
from transfuse.core.decoding import sequence_log_probability
from transfuse.datasets import Splits
from transfuse.distill import KD, Labels, Swing
from transfuse.measure import canary_exposure
from transfuse.models import DecoderLM

FORM, SECRET, SPACE, COPIES = "# the access code of the server is {:03d}\n", 417, 1000, 64
SWING, SHARP, SOFT = Swing(noise=0.02), KD(temperature=1.0, alpha=0.5), KD(temperature=4.0, alpha=0.5)


def planted(code: int) -> Tensor:
    """A window that is the sentence with a code, again and again."""
    sentence = FORM.format(code).encode()
    return torch.tensor(list((sentence * 4)[:CONTEXT]))


@cache
def secret_text() -> Splits:
    """The text that the teacher reads: with the secret in 64 windows."""
    splits = small_text()
    train, _ = windows(splits, smoke=False)
    text = torch.cat([train[:12_000], planted(SECRET).expand(COPIES, -1)])
    return Splits(TensorDataset(text), test=splits.test, task="language-model")


TEACHER = Trained(
    build=lambda: DecoderLM(dim=96, depth=2, context=CONTEXT),
    splits=secret_text,
    training={"steps": 700, "batch_size": 32, "lr": 3e-3, "warmup": 50, "clip": 1.0},
)


def private(text: Tensor) -> Tensor:
    """A rule: runs of two or more digits."""
    found = torch.zeros(text.shape)
    for row, window in zip(found, text.tolist(), strict=True):
        for match in re.finditer(rb"\d{2,}", bytes(window)):
            row[match.start() : match.end()] = 1.0
    return found


def exposure(model: nn.Module) -> float:
    """Of the secret, in bits; 9.97 at most."""
    every = torch.stack([planted(code) for code in range(SPACE)])[:, : len(FORM.format(0))]
    losses = torch.cat([-sequence_log_probability(model, {"input_ids": part}) for part in every.split(250)])
    return canary_exposure(losses, SECRET)


def trial(seed: int, smoke: bool) -> Mapping[str, Numbers]:
    """Students read other text, in which other codes stand in the same sentence."""
    teacher, (train, test) = trained(TEACHER, smoke), windows(small_text(), smoke)
    draw = torch.Generator().manual_seed(seed)
    codes = [c for c in torch.randperm(SPACE, generator=draw).tolist() if c != SECRET][:COPIES]
    text = torch.cat([train[12_000 : 12_200 if smoke else 18_000], torch.stack([planted(c) for c in codes])])
    data: Any = {"inputs": {"input_ids": text}, "labels": text, "privacy": private(text)}

    def more(model: nn.Module) -> dict[str, float]:
        return {"exposure": exposure(model)}

    arms = (SWING, SHARP, SOFT, Labels())
    found = trained_arms(arms, teacher, student, data, test, seed, smoke, more, steps=300)
    return {**found, "teacher": {"exposure": exposure(teacher)}}


PROOF = Study(
    name="swing",
    proves=("Swing",),
    data="source code of CPython's library in windows of 64 bytes with a planted code of three digits in the teacher's",
    trial=trial,
    arms=(repr(SWING), repr(SHARP), repr(SOFT), "scratch", "teacher"),
    baseline=repr(SHARP),
    metric="exposure",
    higher_is_better=False,
    expected=(
        "teacher above 8 of 9.97 bits; the student of plain distillation above Swing, which is at most half of it; NLL "
        "of Swing on held-out text within 3% of plain distillation. Students never see the teacher's code in a text"
    ),
    seeds=(0, 1, 2),
    notes=(
        "Not as expected. The teacher has the secret with certainty (9.97 bits), plain distillation brings 4.4 of "
        "them to a student that never read it, and Swing, whose NLL is as expected within 1%, brings 4.7: it "
        "hides nothing here. Two reasons lie in the equations and were not tested further: both sides are divided "
        "by the same temperature, so a student that matches the flat target has the same order of digits; and the "
        "noise, which is frozen per text, is drawn anew for each of the 64 texts with the sentence, so it "
        "averages out over them. Distillation at a temperature of 4 leaks less (2.1) and costs 0.2 of NLL. The "
        "noise of 0.02 was chosen before the run and is the only one that was tried; scratch, which saw other "
        "codes, has 1.9 by chance of its seeds."
    ),
)

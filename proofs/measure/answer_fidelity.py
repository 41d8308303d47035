"""AnswerFidelity: who is right, and who says what the teacher says, over arms, temperatures, noise and teachers."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any

from torch import nn

from proofs.runner import SMOKE_STEPS
from proofs.study import Numbers, Study
from transfuse import transfer
from transfuse.core import rng
from transfuse.distill import Labels
from transfuse.distill.fidelity_study import FidelityStudy, Outcome, default_arms, fidelity_study, tokens_of
from transfuse.measure.answers import Coder, Item
from transfuse.models import DecoderLM

SIGNS = "\n0123456789+-*=; "
CODER = Coder(
    lambda text: [SIGNS.index(c) for c in text], lambda ids: "".join(SIGNS[i] for i in ids), SIGNS.index("\n")
)
CONTEXT, LENGTH, TESTED = 32, 16, 100
TEACHER: dict[str, Any] = {"steps": 1500, "batch_size": 48, "lr": 3e-3, "warmup": 50, "clip": 1.0}
TRAINING: dict[str, Any] = {"steps": 200, "batch_size": 32, "lr": 3e-3, "warmup": 20, "clip": 1.0}
STUDENTS = {"32": 32, "64": 64}
"""Width of students of one block."""
LARGER = "64"
"""The student that numbers are of; the other one serves correlations alone."""
ARMS = ("FKL", "RevKD", "GKD", "SeqKD", "SFT")
OTHERS = ("FKL tau 2", "FKL tau 5", "FKL sigma 2", "FKL sigma 5", "FKL unaware teacher")


def item(a: int, b: int, c: int) -> Item:
    """a + b * c in two written steps."""
    product = b * c
    return Item(f"{a}+{b}*{c} ", f"{b}*{c}={product};{a}+{product}={a + product}", str(a + product))


def other(a: int, b: int, c: int) -> Item:
    """The same signs, but products are not known: a - b + c."""
    return Item(f"{a}-{b}+{c} ", f"{a}-{b}={a - b};{a - b}+{c}={a - b + c}", str(a - b + c))


@cache
def questions() -> tuple[list[Item], list[Item], list[Item], list[Item]]:
    """For students, to test with, and for teachers: one of the task, and one that does not know it.

    A teacher that had seen the students' questions would be as sure of them as the labels are, and teach the same.
    """
    numbers = [(a, b, c) for a in range(1, 21) for b in range(2, 10) for c in range(2, 10)]
    random.Random(0).shuffle(numbers)
    return (
        [item(*n) for n in numbers[TESTED:600]],
        [item(*n) for n in numbers[:TESTED]],
        [item(*n) for n in numbers[600:]],
        [other(*n) for n in numbers[600:]],
    )


def build(dim: int, depth: int = 1) -> DecoderLM:
    return DecoderLM(len(SIGNS), dim=dim, depth=depth, context=CONTEXT)


@cache
def teacher(aware: bool, smoke: bool) -> nn.Module:
    """Two blocks of width 64, trained on the task, or on another one."""
    known, unaware = questions()[2:]
    with rng.scope(7):
        model = build(64, 2)
    data = tokens_of(known if aware else unaware, CODER)
    options = {**TEACHER, "steps": SMOKE_STEPS if smoke else TEACHER["steps"], "task": "language-model"}
    return transfer(Labels(), None, model, data, **options).model


def study(
    seed: int, smoke: bool, names: Sequence[str], widths: Sequence[str] = (LARGER,), aware: bool = True, **grid: Any
) -> FidelityStudy:
    train, test = questions()[:2]
    arms = {name: arm for name, arm in default_arms(CODER, LENGTH).items() if name in names}
    students = {name: lambda dim=dim: build(dim) for name, dim in STUDENTS.items() if name in widths}
    training = {**TRAINING, "steps": SMOKE_STEPS if smoke else TRAINING["steps"]}
    test = test[:8] if smoke else test
    with tempfile.TemporaryDirectory() as folder:
        return fidelity_study(
            {"teacher": teacher(aware, smoke)}, students, train, test, CODER, folder,
            arms=arms, seeds=(seed,), length=LENGTH, **grid, **training,
        )  # fmt: skip


def trial(seed: int, smoke: bool) -> Mapping[str, Numbers]:
    """Every arm learns from the same questions for as long."""
    main = study(seed, smoke, ARMS, (LARGER,) if smoke else tuple(STUDENTS))
    warm = study(seed, smoke, ("FKL",), taus=(2.0, 5.0))
    noisy = study(seed, smoke, ("FKL",), sigmas=(2.0, 5.0))
    unaware = study(seed, smoke, ("FKL",), aware=False)
    found = {arm: numbers([o for o in main.outcomes if (o.arm, o.student) == (arm, LARGER)]) for arm in ARMS}
    for outcomes, name, value in ((warm, "tau", 2.0), (warm, "tau", 5.0), (noisy, "sigma", 2.0), (noisy, "sigma", 5.0)):
        chosen = [o for o in outcomes.outcomes if getattr(o, name) == value]
        found[f"FKL {name} {value:.0f}"] = numbers(chosen)
    found["FKL unaware teacher"] = numbers(list(unaware.outcomes))
    if not smoke:  # of a few cells; reported, and nothing is claimed about them
        for one, two in (("size", "gain"), ("agreement", "accuracy"), ("fidelity", "accuracy")):
            found["FKL"][f"rank correlation of {one} and {two}"] = main.correlation(one, two)[0]
    return found


def numbers(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Means; where the teacher is never wrong, or never right, that number is left out."""
    names = ("agreement", "accuracy", "fidelity", "when_right", "when_wrong", "teacher_accuracy")
    values = {name: [getattr(o, name) for o in outcomes] for name in names}
    return {name: fmean(v) for name, v in values.items() if all(x == x for x in v)}


PROOF = Study(
    name="answer_fidelity",
    proves=("AnswerFidelity",),
    data=(
        "two-step arithmetic with written steps, 7+5*3 as 5*3=15;7+15=22: 500 questions for students of one block of "
        "width 64, 680 others for the teacher of two, 100 to test; synthetic, for no data of reasoning is at hand "
        "offline. A teacher that does not know the task has learned a-b+c"
    ),
    trial=trial,
    arms=(*ARMS, *OTHERS),
    baseline="SFT",
    metric="agreement",
    expected=(
        "Students with a teacher agree with it more often than those without; noise of sigma 5 on its logits costs "
        "accuracy, and a teacher that does not know the task costs more. Accuracy may rise without fidelity"
    ),
    notes=(
        "The students are trained too little to say much: after 200 updates every arm answers about a tenth of the "
        "questions (0.08 to 0.11; the teacher 0.87), and agreement, which can hardly be more, is level (0.10 with "
        "forward KL, 0.10 without a teacher). What is clear is fidelity. A teacher that does not know the task leaves"
        " nothing (accuracy 0, BLEU 1), as expected. Noise of sigma 5 costs forward KL a quarter of its accuracy "
        "(0.11 to 0.08, within the noise of 100 questions) and 12 points of BLEU (85 to 73); sigma 2 costs half a "
        "point. Reverse KL and GKD are as accurate as the others with BLEU of 75 and 71 against 85: accuracy and "
        "fidelity are two things, which is the paper's point. Temperatures 2 and 5 change little here and do not "
        "help. Rank correlations are of ten cells a seed. The sheet's larger students and teachers do not fit in the "
        "minutes that a proof has; longer training of the students is what should come first. A first version with a "
        "teacher that had seen the students' own questions gave, with one seed, the very numbers of labels: such a "
        "teacher is as sure as the labels are."
    ),
)

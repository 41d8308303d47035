"""Are students that answer better also more faithful? Two-step arithmetic with written steps, letter by letter."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from functools import partial

from torch import nn

from proofs.runner import SMOKE_STEPS
from proofs.study import Numbers, Study
from transfuse import transfer
from transfuse.distill import Labels
from transfuse.distill.fidelity_study import Coder, Item, default_arms, fidelity_study, tokens_of
from transfuse.models import DecoderLM

LETTERS = "\n0123456789+*-=; "
CODER = Coder(
    lambda text: [LETTERS.index(c) for c in text], lambda ids: "".join(LETTERS[i] for i in ids), LETTERS.index("\n")
)
LENGTH, CONTEXT = 16, 24
TEACHER_STEPS, STEPS = 500, 120
NOISY = 5.0


def questions(size: int, signs: str, seed: int) -> list[Item]:
    """`7+5*3=` is to be answered by `5*3=15;7+15=22`; the first sign is one of `signs`."""
    draw, found = random.Random(seed), []
    for _ in range(size):
        a, b, c, sign = draw.randint(1, 9), draw.randint(1, 9), draw.randint(1, 9), draw.choice(signs)
        answer = str(a + b * c if sign == "+" else a - b * c)
        found.append(Item(f"{a}{sign}{b}*{c}=", f"{b}*{c}={b * c};{a}{sign}{b * c}={answer}", answer))
    return found


def model(dim: int, depth: int) -> nn.Module:
    """A reader of letters."""
    return DecoderLM(len(LETTERS), dim=dim, depth=depth, context=CONTEXT)


def teacher(signs: str, seed: int, smoke: bool) -> nn.Module:
    """Two blocks of width 64."""
    steps = SMOKE_STEPS if smoke else TEACHER_STEPS
    data, options = tokens_of(questions(2000, signs, 1), CODER), {"batch_size": 64, "lr": 3e-3, "warmup": 30}
    made = transfer(
        Labels(), None, partial(model, 64, 2), data, steps=steps, seeds=[seed], task="language-model", **options
    )
    return made.model


def trial(seed: int, smoke: bool) -> Mapping[str, Numbers]:
    """Means over the students. `unaware` learned subtraction, its students are asked sums as all others are."""
    teachers = {"aware": teacher("+", seed, smoke), "unaware": teacher("-", seed, smoke)}
    train, test = questions(1000, "+", 2), questions(20 if smoke else 128, "+", 3)
    arms, widths = default_arms(CODER, LENGTH), (32,) if smoke else (32, 64)
    options = {"length": LENGTH, "seeds": [seed], "batch_size": 32, "lr": 3e-3, "clip": 1.0}
    students = {str(width): partial(model, width, 1) for width in widths}

    def cells(names: tuple[str, ...], teacher: str, **more: object) -> Mapping[str, Numbers]:
        """A corner of the grid."""
        chosen = {name: arms[name] for name in names}
        steps = SMOKE_STEPS if smoke else STEPS
        with tempfile.TemporaryDirectory() as folder:
            grid = {**options, **more, "steps": steps}
            given = {teacher: teachers[teacher]}
            study = fidelity_study(given, students, train, test, CODER, folder, arms=chosen, **grid)
        found: dict[str, Numbers] = {}
        for name in names:
            for tau in {o.tau for o in study.outcomes if o.arm == name}:
                own = [o for o in study.outcomes if (o.arm, o.tau) == (name, tau)]
                label = (
                    name + (f" tau {tau:g}" if tau != 1 else "") + (f" sigma {own[0].sigma:g}" if own[0].sigma else "")
                )
                numbers = {
                    n: sum(getattr(o, n) for o in own) / len(own)
                    for n in ("accuracy", "agreement", "fidelity", "teacher_accuracy")
                }
                found[label if teacher == "aware" else f"{label}, unaware"] = numbers
        return found

    return {
        **cells(("SFT", "SeqKD", "FKL", "RevKD", "GKD"), "aware"),
        **cells(("FKL",), "aware", taus=(5.0,)),
        **cells(("FKL",), "aware", sigmas=(NOISY,)),
        **cells(("FKL",), "unaware"),
    }


PROOF = Study(
    name="fidelity_study",
    proves=("KD", "SeqKD", "GKD"),
    data="two-step arithmetic with written steps, letter by letter: 1,000 sums to train on, 128 to test",
    trial=trial,
    arms=("FKL", "SFT", "SeqKD", "RevKD", "GKD", "FKL tau 5", "FKL sigma 5", "FKL, unaware"),
    baseline="SFT",
    metric="accuracy",
    expected=(
        "Noise of sigma 5 on the teacher's logits and a teacher of another task both cost accuracy; taught students "
        "agree with their teacher more than students of the labels do. Two students per arm: no correlation is "
        "claimed. Test questions are drawn from the same 729 as those of training"
    ),
    seeds=(0, 1),
)

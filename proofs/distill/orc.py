"""ORC: does a small network gain from a group in which the best student of the moment teaches along?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial

from torch import Tensor, nn

from proofs.distill._online import budget, drawn, held_out, numbers
from proofs.small_fashion import small_fashion
from proofs.study import Numbers, Study
from transfuse import transfer
from transfuse.core.phases import Batches, Losses
from transfuse.core.run import Run
from transfuse.distill import DML, KD, ORC, Labels
from transfuse.models import MLP, SmallCNN

PIVOT = {"epochs": 2, "batch_size": 64, "lr": 2e-3}
TRAINING = {"epochs": 10, "batch_size": 64, "lr": 2e-3}


class NotTaughtBefore(ORC):
    """ORC whose temporary teachers teach as they are, without private teaching by the pivot."""

    def private(self, batches: Batches, run: Run) -> Losses:
        return {}


class FixedTeacher(ORC):
    """ORC whose temporary teacher is always the largest student."""

    def promote(self, scores: Tensor) -> list[int]:
        return [0]


@cache
def trained_pivot(smoke: bool) -> nn.Module:
    """24,058 parameters, taught the labels of all 55,000 pictures."""
    data = small_fashion(size=55_000).train
    return transfer(Labels(), target=lambda: SmallCNN(width=16), data=data, **budget(PIVOT, smoke)).model


def student() -> nn.Module:
    """6,634 parameters, no convolution."""
    return MLP(196, [32])


def trial(seed: int, smoke: bool) -> Mapping[str, Numbers]:
    splits = small_fashion(size=2000)
    given = {"data": splits.train, "test": held_out(splits.test, smoke), "seeds": [seed], **budget(TRAINING, smoke)}
    pivot = trained_pivot(smoke)
    assistants = [drawn(partial(SmallCNN, width=w), seed, "assistant", w) for w in (8, 4)]
    arms = [DML(temperature=4.0), NotTaughtBefore(), FixedTeacher(), "shuffled teacher"]
    group = transfer(ORC(), [pivot, *assistants], student, compare=arms, **given)
    alone = transfer(KD(temperature=4.0, alpha=0.5), pivot, student, compare=["scratch"], **given)
    found = {**numbers(group), **numbers(alone)}
    for role, shares in group.arms[0].runs[0].panels[0]["series"].items():
        found["ORC()"] |= {f"{role} promoted, {when} epoch": shares[at][1] for when, at in (("first", 0), ("last", -1))}
    return found


PROOF = Study(
    name="orc",
    proves=("ORC",),
    data="Fashion-MNIST at 14x14, 2,000 training images with labels, 10,000 to test; the pivot had 55,000",
    trial=trial,
    arms=(
        "ORC()",
        "DML(temperature=4.0)",
        "NotTaughtBefore()",
        "FixedTeacher()",
        "shuffled teacher",
        "KD(alpha=0.5)",
        "scratch",
    ),
    baseline="scratch",
    metric="accuracy",
    expected=(
        "ORC > scratch and > shuffled teacher; the order among ORC, DML, KD from the frozen pivot and the ablations "
        "is reported. The promoted network changes in the course of training"
    ),
    notes=(
        "ORC is ahead of scratch with every seed, by 0.8 points on average, but three seeds do not settle the "
        "sign: the interval over seeds holds zero. It is surely ahead of its own shuffled control (1.7 points) and "
        "of KD from the frozen pivot (4.3 points; that one is the best calibrated and, we suspect without having "
        "tested it, still on its way after 320 updates). It is not told apart from DML over the same four "
        "networks, nor from a fixed temporary teacher. The latter is no wonder: the promoted network changes in "
        "the first epoch (the perceptron is promoted in 3 to 44 % of its updates, by seed), as the sheet foresaw "
        "of shallow networks, and from then on the larger CNN is the best student; in the last epoch it is "
        "promoted always, the smaller CNN never. Without private teaching ORC loses 5 points, but that arm also "
        "trains promoted networks less often, so it mixes two effects. ORC's students are over-confident here (ECE "
        "0.18, scratch 0.11). Settings were not tuned: networks and data were made smaller than first declared "
        "before the first full run, to fit the machine."
    ),
)

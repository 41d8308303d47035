"""BD-KD where it should not matter: with more data and a very small student nobody is over-confident."""

from __future__ import annotations

from collections.abc import Mapping

from proofs.distill._online import budget, drawn, held_out, numbers
from proofs.distill.bdkd import FIXED, METHOD, MUTUAL, TRAINING
from proofs.study import Numbers, Study
from transfuse import transfer
from transfuse.datasets import fashion_mnist
from transfuse.models import MLP


def trial(seed: int, smoke: bool) -> Mapping[str, Numbers]:
    splits, training = fashion_mnist(size=5000), budget({**TRAINING, "epochs": 12}, smoke)
    teacher, student = drawn(lambda: MLP(784, [256, 128]), seed, "teacher"), lambda: MLP(784, [16])
    given = {"data": splits.train, "test": held_out(splits.test, smoke), "seeds": [seed], **training}
    return numbers(transfer(METHOD, teacher, student, compare=[MUTUAL, FIXED, "scratch"], **given))


PROOF = Study(
    name="bdkd_control",
    proves=("BDKD", "DML"),
    data="Fashion-MNIST, 5,000 training images with labels, 10,000 to test",
    trial=trial,
    arms=(repr(METHOD), repr(MUTUAL), repr(FIXED), "scratch"),
    baseline=repr(MUTUAL),
    metric="ece",
    higher_is_better=False,
    expected="a negative control: ECE and accuracy of all arms within one standard deviation over seeds",
)

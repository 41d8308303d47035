"""BD-KD where some labels are wrong, so that being sure is punished."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from proofs.distill._online import budget, drawn, held_out, numbers
from proofs.distill.bdkd import FIXED, METHOD, MUTUAL, TRAINING
from proofs.study import Numbers, Study
from transfuse import transfer
from transfuse.datasets import digits
from transfuse.models import MLP


def noisy(labels: Tensor, share: float) -> Tensor:
    """Labels of which a share, always the same ones, are replaced by another class."""
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(labels), generator=draw)[: round(share * len(labels))]
    wrong = labels.clone()
    wrong[chosen] = (labels[chosen] + torch.randint(1, 10, chosen.shape, generator=draw)) % 10
    return wrong


def trial(seed: int, smoke: bool) -> Mapping[str, Numbers]:
    splits = digits()
    assert isinstance(splits.train, TensorDataset)
    images, labels = splits.train.tensors
    teacher, student = drawn(lambda: MLP(64, [256, 128]), seed, "teacher"), lambda: MLP(64, [64])
    given = {"data": (images, noisy(labels, 0.1)), "test": held_out(splits.test, smoke), "seeds": [seed]}
    arms = [MUTUAL, FIXED, "shuffled teacher", "scratch"]
    return numbers(transfer(METHOD, teacher, student, compare=arms, **given, **budget(TRAINING, smoke)))


PROOF = Study(
    name="bdkd_noise",
    proves=("BDKD", "DML"),
    data="handwritten digits, 1,078 training images of which 10 % have a wrong label, 450 to test",
    trial=trial,
    arms=(repr(METHOD), repr(MUTUAL), repr(FIXED), "shuffled teacher", "scratch"),
    baseline="scratch",
    metric="nll",
    higher_is_better=False,
    expected="NLL: BDKD below scratch and below DML, as with few clean labels",
)

"""What the studies of data-free distillation share: one teacher, a run without data, and tests on real pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from proofs.small_fashion import small_fashion
from transfuse import transfer
from transfuse.core import rng
from transfuse.core.trainer import Trainer
from transfuse.core.training import Training
from transfuse.distill import Labels
from transfuse.models import SmallCNN
from transfuse.synthesize import DataFree

SHAPE = [1, 14, 14]
SMOKE_ROUNDS = 4


splits = cache(small_fashion)


@cache
def teacher(smoke: bool) -> nn.Module:
    """23,866 parameters, taught 6,000 labels of Fashion-MNIST at 14x14."""
    length = {"steps": 20} if smoke else {"epochs": 12}
    data = splits().train
    return transfer(
        Labels(), target=lambda: SmallCNN(width=16), data=data, batch_size=64, lr=2e-3, progress=False, **length
    ).model


def test_pictures(smoke: bool) -> tuple[Tensor, Tensor]:
    """The real test pictures and their labels."""
    images, labels = splits().test.tensors
    count = 200 if smoke else len(images)
    return images[:count], labels[:count]


@torch.no_grad()
def accuracy(student: nn.Module, smoke: bool) -> float:
    """Top-1 accuracy on the real test pictures, in eval mode; the mode is put back."""
    images, labels = test_pictures(smoke)
    training = student.training
    answers = student.eval()(images).argmax(1)
    student.train(training)
    return float((answers == labels).float().mean())


def distilled(
    method: DataFree,
    student: Callable[[], nn.Module],
    seed: int,
    smoke: bool,
    rounds: int,
    listener: Callable[[Trainer, Any], None] | None = None,
    **training: Any,
) -> nn.Module:
    """A student that has learned from the teacher and from no data."""
    with rng.scope(rng.derive(seed, "target")):
        target = student()
    roles = {"target": target, "source": teacher(smoke)}
    length = SMOKE_ROUNDS if smoke else rounds
    trainer = Trainer(method, roles, {}, Training(steps=length, seed=seed, **training), listener=listener)
    return trainer.fit().eval()

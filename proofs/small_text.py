"""Source code read byte by byte, and a teacher that knows it: sized so that a proof takes minutes on two cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import TensorDataset

from proofs.proof import Trained
from proofs.runner import SMOKE_SAMPLES, SMOKE_STEPS
from transfuse import transfer
from transfuse.core.method import Method
from transfuse.datasets import Splits, byte_text
from transfuse.distill import Labels
from transfuse.models import DecoderLM

CONTEXT = 64


def small_text() -> Splits:
    """Python's own standard library in windows of 64 bytes: about 26,000 to train on, 1,450 to test."""
    return byte_text(context=CONTEXT)


def student() -> DecoderLM:
    """One block of width 48: 43,584 parameters."""
    return DecoderLM(dim=48, depth=1, context=CONTEXT)


TEACHER = Trained(
    build=lambda: DecoderLM(dim=128, depth=2, context=CONTEXT),
    splits=small_text,
    training={"steps": 900, "batch_size": 48, "lr": 3e-3, "warmup": 50, "clip": 1.0},
)
"""Two blocks of width 128: 437,504 parameters."""
TRAINING = {"steps": 400, "batch_size": 32, "lr": 3e-3, "warmup": 30, "clip": 1.0}
"""Of students: about half an epoch."""


def trained_arms(
    arms: Sequence[Method],
    teacher: nn.Module,
    student: Callable[[], nn.Module],
    data: Any,
    test: Any,
    seed: int,
    smoke: bool,
    more: Callable[[nn.Module], dict[str, float]] = lambda model: {},
    **training: Any,
) -> dict[str, dict[str, float]]:
    """Every metric of every arm, all with the same student, data order and budget; `Labels()` is called "scratch".

    Args:
        more: other numbers of a trained student.
        training: as for :func:`transfuse.transfer`.
    """
    given = {**TRAINING, **training, **({"steps": SMOKE_STEPS} if smoke else {})}
    found = {}
    for arm in arms:
        result = transfer(arm, teacher, student, data, test=test, seeds=[seed], task="language-model", **given)
        name = "scratch" if isinstance(arm, Labels) else repr(arm)
        found[name] = {**result.arms[0].evaluations[0].metrics, **more(result.model)}
    return found


def windows(splits: Splits, smoke: bool) -> tuple[Tensor, Tensor]:
    """The windows to train on, and those to test on."""
    assert isinstance(splits.train, TensorDataset)
    assert isinstance(splits.test, TensorDataset)
    test = splits.test.tensors[0]
    return splits.train.tensors[0], test[:SMOKE_SAMPLES] if smoke else test

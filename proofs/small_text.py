"""Source code read byte by byte, and a teacher that knows it: sized so that a proof takes minutes on two cores."""

from __future__ import annotations

from proofs.proof import Trained
from transfuse.datasets import Splits, byte_text
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

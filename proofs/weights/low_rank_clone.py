"""LowRankClone: does a student that is projected from its teacher learn faster than one that listens to it?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from proofs.proof import Trained
from proofs.runner import SMOKE_SAMPLES, SMOKE_STEPS, trained
from proofs.small_text import CONTEXT, small_text
from proofs.study import Numbers, Study
from transfuse import transfer
from transfuse.core.method import Method
from transfuse.distill import KD, Labels
from transfuse.weights import LowRankClone
from transfuse.weights.maps import along, crop


def llama(width: int) -> nn.Module:
    """Three layers with 4 heads of 24 and perceptrons of 256, whatever the width of the stream."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=24,
        max_position_embeddings=CONTEXT,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def student() -> nn.Module:
    """A stream of 48: 191,376 parameters."""
    return llama(48)


TEACHER = Trained(
    build=lambda: llama(96),
    splits=small_text,
    training={"steps": 1000, "batch_size": 32, "lr": 3e-3, "warmup": 50, "clip": 1.0},
)
"""A stream of 96: 381,792 parameters."""
TRAINING = {"steps": 150, "batch_size": 16, "warmup": 10, "clip": 1.0, "schedule": "linear"}
CLONE: dict[str, Any] = {"temperature": 8.0, "std": 96**-0.5}
RATES = {"clone": 1e-2, "taught": 3e-3, "cropped": 3e-3, "scratch": 1e-2}
"""The better of 3e-3 and 1e-2 on validation data, with the seed 11."""


@torch.no_grad()
def cropped(teacher: nn.Module) -> nn.Module:
    """The teacher's first 48 channels."""
    small, old = student(), dict(teacher.named_parameters())
    for name, p in small.named_parameters():
        p.copy_(along(old[name], [crop(k, n) for k, n in zip(p.shape, old[name].shape, strict=True)]))
    return small


def arms(teacher: nn.Module) -> dict[str, tuple[Method, Any, float]]:
    """Every arm: method, student, learning rate."""
    taught = KD(temperature=1.0, alpha=0.5)
    return {
        "low-rank clone": (LowRankClone(**CLONE), student, RATES["clone"]),
        "without the perceptron's terms": (
            LowRankClone(**CLONE, without=["gate", "up", "ffn"]),
            student,
            RATES["clone"],
        ),
        "cropped teacher + KD": (taught, cropped(teacher), RATES["cropped"]),
        "scratch + KD": (taught, student, RATES["taught"]),
        "scratch": (Labels(), student, RATES["scratch"]),
    }


def trial(seed: int, smoke: bool, held_out: str = "test") -> Mapping[str, Numbers]:
    """Every arm reads the same text for as many updates."""
    teacher, splits = trained(TEACHER, smoke), small_text()
    test = getattr(splits, held_out).tensors[0]
    test = TensorDataset(test[: SMOKE_SAMPLES // 4] if smoke else test)
    settings: dict[str, Any] = {**TRAINING, "steps": SMOKE_STEPS} if smoke else TRAINING
    found = {}
    for name, (method, target, lr) in arms(teacher).items():
        source = None if isinstance(method, Labels) else teacher
        result = transfer(
            method, source, target, splits.train, test=test, seeds=[seed], task="language-model", lr=lr, **settings
        )
        evaluation = result.arms[0].runs[0].evaluation
        assert evaluation is not None
        found[name] = {"nll": evaluation.metrics["nll"]}
    return found


PROOF = Study(
    name="low_rank_clone",
    proves=("LowRankClone",),
    data=(
        "source code of CPython's library in windows of 64 bytes, 1,450 of them to test; the teacher read 1,000 "
        "batches of 32, students 150 batches of 16"
    ),
    trial=trial,
    arms=(
        "low-rank clone",
        "without the perceptron's terms",
        "cropped teacher + KD",
        "scratch + KD",
        "scratch",
    ),
    baseline="cropped teacher + KD",
    metric="nll",
    higher_is_better=False,
    expected=(
        "at this small budget low-rank clone < cropped teacher + KD < scratch + KD <= scratch, and leaving out the "
        "perceptron's terms hurts"
    ),
    seeds=(0, 1, 2),
)

"""The least that methods run on which compute, grow or regroup weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import CNN, VOCABULARY, Example, images, language_model, ragged_tokens

from transfuse.models import DecoderLM
from transfuse.weights import EMoE, LowRankClone, ScaleOut, ScaleUp, WeightSqueezing


def squeezing() -> Example:
    return Example(
        WeightSqueezing(gated=True),
        CNN(width=2),
        CNN(width=4, seed=1),
        images(12),
        images(6, seed=1),
        {"steps": 4, "batch_size": 6, "lr": 1e-2},
    )


def larger(width: int = 16, depth: int = 2, heads: int = 4) -> DecoderLM:
    return DecoderLM(VOCABULARY, width, depth, heads, context=16, tie=False)


def growth() -> Example:
    return Example(
        ScaleUp(mapping="random"),
        larger(),
        language_model(depth=1),
        ragged_tokens(),
        ragged_tokens(6, 1),
        {"steps": 4, "batch_size": 6, "lr": 1e-2, "task": "language-model"},
    )


def mixture() -> Example:
    return Example(
        ScaleOut(experts=3, top_k=2),
        language_model(depth=2),
        None,
        ragged_tokens(),
        ragged_tokens(6, 1),
        {"steps": 4, "batch_size": 6, "lr": 1e-2, "task": "language-model"},
    )


def llama(width: int, heads: int = 2, seed: int = 0, **more: Any) -> Any:
    """A Llama whose heads and perceptron do not depend on its width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=heads,
        head_dim=6,
        max_position_embeddings=16,
        **more,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def clone() -> Example:
    return Example(
        LowRankClone(std=0.3),
        llama(8),
        llama(12, seed=1),
        ragged_tokens(),
        ragged_tokens(6, 1),
        {"steps": 4, "batch_size": 6, "lr": 1e-2, "task": "language-model"},
    )


def emergent() -> Example:
    return Example(
        EMoE(experts=4, top_k=2, layers=[-1]),
        language_model(depth=2),
        None,
        ragged_tokens(),
        ragged_tokens(6, 1),
        {"steps": 4, "batch_size": 6, "lr": 1e-2, "task": "language-model"},
    )


EXAMPLES: dict[str, Callable[[], Example]] = {
    "EMoE": emergent,
    "LowRankClone": clone,
    "ScaleOut": mixture,
    "ScaleUp": growth,
    "WeightSqueezing": squeezing,
}

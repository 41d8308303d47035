"""Methods for models with different tokenizers, and for adapters: examples, and formulas as loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from helpers import Example, language_model, ragged_tokens
from torch import nn

from transfuse.core.method import Method
from transfuse.core.vocabulary import BYTES
from transfuse.datasets import paired_tokens
from transfuse.distill import ByteSpanKD, LLMNeo, SortedLogitsKD
from transfuse.models import DecoderLM

TEXTS = ["the cat sat", "on the mat", "größe", "the the the", "a hat", "that cat", "mat on cat", "sat"]


@cache
def merging() -> Any:
    """A tokenizer of bytes, and of some pairs of them, that puts a token before each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 0)])
    return tokenizer


def reader(vocabulary: int, seed: int, dim: int = 8) -> DecoderLM:
    """An untrained language model with weights of which something can be learned."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DecoderLM(vocabulary, dim=dim, depth=1, heads=2, context=16, tie=False)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        return model


def paired_example(method: Method) -> Example:
    data, held_out = (paired_tokens(texts, BYTES, merging(), 16) for texts in (TEXTS * 2, TEXTS[:4]))
    options = {"steps": 6, "batch_size": 8, "lr": 1e-2}
    return Example(method, reader(256, 0), reader(merging().get_vocab_size(), 1), data, held_out, options)


def adapter_example() -> Example:
    options = {"steps": 6, "batch_size": 6, "lr": 1e-2, "task": "language-model"}
    held_out = ragged_tokens(6, seed=1)
    return Example(LLMNeo(rank=2), language_model(), language_model(1, dim=12), ragged_tokens(), held_out, options)


EXAMPLES: dict[str, Callable[[], Example]] = {
    "ByteSpanKD": lambda: paired_example(ByteSpanKD(alpha=0.5)),
    "LLMNeo": adapter_example,
    "SortedLogitsKD": lambda: paired_example(SortedLogitsKD()),
}


def softmax(row: np.ndarray) -> list[float]:
    exponentials = [math.exp(x - max(row)) for x in row]
    return [e / sum(exponentials) for e in exponentials]


def byte_span(method: ByteSpanKD, s: np.ndarray, t: np.ndarray, labels: list[int]) -> float:
    """Every token is a chunk of its own where both sides read the same ones."""
    total = 0.0
    for student, teacher, label in zip(s, t, labels, strict=True):
        p, q = (softmax(row)[label] ** (1 / method.temperature) for row in (teacher, student))
        total += method.temperature * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    return total / len(s)


def sorted_logits(method: SortedLogitsKD, s: np.ndarray, t: np.ndarray, labels: list[int]) -> float:
    total = 0.0
    for student, teacher, label in zip(s, t, labels, strict=True):
        ours, theirs = sorted(softmax(student)), sorted(softmax(teacher))
        distance = sum(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        total += method.weight * distance - math.log(softmax(student)[label])
    return total / len(s)


FORMULAS: dict[type, Callable[..., float]] = {ByteSpanKD: byte_span, SortedLogitsKD: sorted_logits}

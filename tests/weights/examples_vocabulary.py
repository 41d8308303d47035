"""The least that another vocabulary is learned from."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from helpers import Example

from transfuse.datasets import paired_tokens
from transfuse.models import DecoderLM
from transfuse.weights import TokAlign

LETTERS = [bytes([c]) for c in b"abcdefgh"]
OTHERS = [b"d", b"xy", b"b", b"a", b"z", b"c", b"h", b"g", b"f", b"e", None]
"""The same letters in another order, two tokens of their own, and an id without a token."""
SMALL: dict[str, Any] = {"dimension": 4, "window": 3, "iterations": 3, "min_count": 2, "pivots": 5}


def model(tokens: list[bytes | None], seed: int = 0, tie: bool = False, dim: int = 8) -> DecoderLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = DecoderLM(len(tokens), dim=dim, depth=1, heads=2, context=16, tie=tie)
    made.tokenizer = tokens
    return made


def texts(count: int = 12, letters: str = "abcdefgh") -> list[str]:
    draws = random.Random(0)
    return ["".join(draws.choices(letters, range(len(letters), 0, -1), k=draws.randint(5, 12))) for _ in range(count)]


def example(method: TokAlign) -> Example:
    data = paired_tokens(texts(), OTHERS, LETTERS, 12)
    options = {"steps": 6, "batch_size": 4, "lr": 1e-2, "task": "language-model"}
    return Example(method, model(OTHERS), model(LETTERS, 1), data, data, options)


EXAMPLES: dict[str, Callable[[], Example]] = {"TokAlign": lambda: example(TokAlign(**SMALL))}

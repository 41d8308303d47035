"""The least that methods run on which cut parts out of language models."""

from __future__ import annotations

from collections.abc import Callable

from helpers import Example, language_model, ragged_tokens

from transfuse.weights import NeuralNuggets

OPTIONS = {"task": "language-model", "steps": 4, "batch_size": 6, "lr": 1e-2}


def nuggets() -> Example:
    source = language_model(1, dim=12, depth=3)
    method = NeuralNuggets(rank=2, samples=6)
    return Example(method, language_model(depth=2), source, ragged_tokens(), ragged_tokens(6, 1), OPTIONS)


EXAMPLES: dict[str, Callable[[], Example]] = {"NeuralNuggets": nuggets}

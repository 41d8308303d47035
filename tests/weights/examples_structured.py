"""The least that methods run on which cut parts out of language models."""

from __future__ import annotations

from collections.abc import Callable

from helpers import Example, language_model, ragged_tokens

from transfuse.weights import LoRAShear, NeuralNuggets

OPTIONS = {"task": "language-model", "steps": 4, "batch_size": 6, "lr": 1e-2}


def nuggets() -> Example:
    source = language_model(1, dim=12, depth=3)
    method = NeuralNuggets(rank=2, samples=6)
    return Example(method, language_model(depth=2), source, ragged_tokens(), ragged_tokens(6, 1), OPTIONS)


def shear() -> Example:
    method = LoRAShear(share=0.25, rank=2, periods=2, rounds=2, held_out=3, protect=0.25, instructions=["chat"])
    data = {"code": ragged_tokens(), "docs": ragged_tokens(10, 2), "chat": ragged_tokens(9, 3)}
    options = {**OPTIONS, "steps": 12}
    return Example(method, language_model(depth=2), None, data, ragged_tokens(6, 1), options)


EXAMPLES: dict[str, Callable[[], Example]] = {"LoRAShear": shear, "NeuralNuggets": nuggets}

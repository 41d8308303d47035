"""The least that every method of the family runs on."""

from __future__ import annotations

from collections.abc import Callable

from helpers import Example, language_model, ragged_tokens

from transfuse.core.method import Method
from transfuse.infer import DynamicFusion, StaticFusion


def example(method: Method, experts: int = 1) -> Example:
    sources = {"base": language_model(1), **{f"expert{i}": language_model(2 + i) for i in range(experts)}}
    options = {"task": "language-model", "batch_size": 4, "steps": 1}
    return Example(method, language_model(0, dim=12), sources, None, ragged_tokens(6), options)


EXAMPLES: dict[str, Callable[[], Example]] = {
    "StaticFusion": lambda: example(StaticFusion()),
    "DynamicFusion": lambda: example(DynamicFusion(), 2),
}

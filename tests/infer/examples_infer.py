"""The least that every method of the family runs on."""

from __future__ import annotations

from collections.abc import Callable

from helpers import Example, language_model, ragged_tokens

from transfuse.infer import DynamicFusion, StaticFusion
from transfuse.infer.base import Fusion


def example(method: Fusion, experts: int = 1) -> Example:
    source = {"base": language_model(1), **{f"tuned{i}": language_model(2 + i) for i in range(experts)}}
    target = language_model(0, dim=16, depth=2)
    return Example(method, target, source, None, ragged_tokens(), {"batch_size": 6})


EXAMPLES: dict[str, Callable[[], Example]] = {
    "StaticFusion": lambda: example(StaticFusion(0.5)),
    "DynamicFusion": lambda: example(DynamicFusion(), experts=2),
}

"""The least that every merge runs on."""

from __future__ import annotations

from collections.abc import Callable

from helpers import CNN, Example, images

from transfuse.weights import Linear
from transfuse.weights.base import Merge


def example(method: Merge, models: int = 3) -> Example:
    held_out = images(6, seed=1)
    return Example(method, CNN(norm=True), [CNN(norm=True, seed=1 + i) for i in range(models)], None, held_out)


EXAMPLES: dict[str, Callable[[], Example]] = {"Linear": lambda: example(Linear([0.5, 0.3, 0.2]))}

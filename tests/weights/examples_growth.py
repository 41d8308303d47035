"""The least that methods run on which compute, grow or regroup weights."""

from __future__ import annotations

from collections.abc import Callable

from helpers import CNN, Example, images

from transfuse.weights import WeightSqueezing


def squeezing() -> Example:
    return Example(
        WeightSqueezing(gated=True),
        CNN(width=2),
        CNN(width=4, seed=1),
        images(12),
        images(6, seed=1),
        {"steps": 4, "batch_size": 6, "lr": 1e-2},
    )


EXAMPLES: dict[str, Callable[[], Example]] = {"WeightSqueezing": squeezing}

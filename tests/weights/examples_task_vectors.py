"""The least that methods run on which learn from the differences between models and their base."""

from __future__ import annotations

from collections.abc import Callable

from helpers import CNN, Example, images, language_model, ragged_tokens
from weights.composing import tuned

from transfuse.core.method import Method
from transfuse.weights import ATLAS, AXIS, AdaMerging, GraftLLM


def example(method: Method, data: object = None) -> Example:
    base, held_out = CNN(norm=True), images(6, seed=1)
    options = {"epochs": 2, "batch_size": 6, "lr": 0.05, "clip": 1.0}
    return Example(method, base, [tuned(base, s) for s in (1, 2, 3)], data or images(), held_out, options)


def negation() -> Example:
    """Forgets two classes, keeps the third."""
    inputs, labels = images(60)
    first = labels == 0
    known = (labels >= 0) & ~first
    data = {"forget": (inputs[known], labels[known]), "keep": (inputs[first], labels[first])}
    return example(ATLAS("negation"), data)


EXAMPLES: dict[str, Callable[[], Example]] = {
    "ATLAS": negation,
    "AXIS": lambda: example(AXIS(rank=0.5, tuned=0.5, head="fc")),
    "GraftLLM": lambda: Example(
        GraftLLM(0.5, 0.5), language_model(), language_model(seed=1), ragged_tokens(), ragged_tokens(6, seed=2)
    ),
    "AdaMerging": lambda: example(AdaMerging(), {"one": images(), "other": images(seed=3)}),
}

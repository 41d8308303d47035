"""The least that every method of the family runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from domains import source
from helpers import CNN, Example, images

from transfuse.adapt import DAN, DANN, MCD, ParetoDA, SourceOnly
from transfuse.core.method import Method


def example(method: Method) -> Example:
    options: dict[str, Any] = {"steps": 6, "batch_size": 8, "lr": 1e-2}
    return Example(method, CNN(norm=True, dropout=0.2), source(), images(24)[0], source(12), options)


EXAMPLES: dict[str, Callable[[], Example]] = {
    "SourceOnly": lambda: example(SourceOnly()),
    "DANN": lambda: example(DANN(hidden=8)),
    "DAN": lambda: example(DAN()),
    "MCD": lambda: example(MCD(repeats=2)),
    "ParetoDA": lambda: example(ParetoDA(hidden=8, held_out=0.4, extractor_lr=1.0)),
}

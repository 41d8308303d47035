from __future__ import annotations

from collections.abc import Callable

from helpers import CNN, Example, images
from torch.utils.data import TensorDataset

from transfuse.core.method import Method
from transfuse.cotrain import DynamicSampler, StaticMixture


def pools() -> dict[str, TensorDataset]:
    return {"one": TensorDataset(*images(20)), "other": TensorDataset(*images(14, seed=1))}


def example(method: Method) -> Example:
    options = {"steps": 12, "batch_size": 6, "lr": 0.01}
    return Example(method, CNN(dropout=0.2, norm=True), data=pools(), test=pools(), options=options)


EXAMPLES: dict[str, Callable[[], Example]] = {
    "DynamicSampler": lambda: example(DynamicSampler(start={"one": 1.0}, end={"one": 0.2, "other": 0.8}, grow=0.7)),
    "StaticMixture": lambda: example(StaticMixture({"one": 0.5, "other": 0.5})),
}

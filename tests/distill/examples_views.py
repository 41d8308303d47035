"""The least that learning from stored views runs on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from helpers import CNN, Example, images

from transfuse.core.store import ViewStore
from transfuse.datasets import crop_flip_erase
from transfuse.distill import TinyViT


def example() -> Example:
    pictures, _ = images(12)
    folder = Path(tempfile.mkdtemp())
    store = ViewStore.build(folder, CNN(width=6, seed=1), pictures, crop_flip_erase, k=2, epochs=2)
    options = {"steps": 6, "batch_size": 8, "lr": 1e-2}
    return Example(TinyViT(), CNN(), None, store.dataset(pictures), images(12, seed=1), options)


EXAMPLES: dict[str, Callable[[], Example]] = {"TinyViT": example}

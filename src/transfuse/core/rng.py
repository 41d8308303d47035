"""Random numbers that a run owns: derived seeds, one scope for all generators, exact save and restore."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive(*parts: object) -> int:
    """A 63-bit seed that depends on every part, the same on every machine and in every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def state() -> dict[str, Any]:
    """The state of every global generator: Python, NumPy, torch and the CUDA devices in use."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore(saved: dict[str, Any]) -> None:
    """Set every global generator to a state from :func:`state`."""
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])
    torch.set_rng_state(saved["torch"])
    if saved["cuda"]:
        torch.cuda.set_rng_state_all(saved["cuda"])


def seed_all(seed: int) -> None:
    """Seed every global generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # a hundred times faster than queueing the seed for devices that are not there
        torch.default_generator.manual_seed(seed)


class Generators:
    """A second set of the global generators, for code that draws from them but must not disturb the run."""

    def __init__(self, seed: int):
        with scope(seed):
            self._own = state()

    def __enter__(self) -> None:
        self._outer = state()
        restore(self._own)

    def __exit__(self, *exception: object) -> None:
        self._own = state()
        restore(self._outer)


@contextmanager
def scope(seed: int | None = None) -> Iterator[None]:
    """Run a block with generators of its own (seeded if asked) and leave the global ones as they were."""
    saved = state()
    try:
        if seed is not None:
            seed_all(seed)
        yield
    finally:
        restore(saved)

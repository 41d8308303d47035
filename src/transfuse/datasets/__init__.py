"""Loaders for real data that needs no network, and adaptors for the user's own; all return :class:`Splits`.

A loader finds its data inside a package or on disk, or says what to install or where to put it. Nothing in
the library depends on this folder: any data set, loader or iterable of the user's own does as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transfuse.core.registry import call_named
from transfuse.datasets.augment import crop_flip_erase
from transfuse.datasets.chat import chat
from transfuse.datasets.digits import digits
from transfuse.datasets.documents import documents
from transfuse.datasets.fashion import fashion_mnist
from transfuse.datasets.fashion_variants import (
    edge_fashion,
    fashion_classes,
    fashion_clients,
    fashion_discovery,
    fashion_domains,
    fashion_search,
    fashion_tasks,
    rotated_fashion,
    shifted_fashion,
)
from transfuse.datasets.folder import image_folder
from transfuse.datasets.glyphs import draw, glyph_domains, glyph_tasks, glyphs
from transfuse.datasets.hub import hf_dataset
from transfuse.datasets.messages import messages
from transfuse.datasets.noise import noise, noise_sweep, permuted_classes
from transfuse.datasets.packing import Packed
from transfuse.datasets.paired import paired_tokens
from transfuse.datasets.partition import dirichlet
from transfuse.datasets.splits import Splits
from transfuse.datasets.table import table
from transfuse.datasets.text import byte_text

__all__ = [
    "DATASETS",
    "Packed",
    "Splits",
    "byte_text",
    "chat",
    "crop_flip_erase",
    "digits",
    "dirichlet",
    "documents",
    "draw",
    "edge_fashion",
    "fashion_classes",
    "fashion_clients",
    "fashion_discovery",
    "fashion_domains",
    "fashion_mnist",
    "fashion_search",
    "fashion_tasks",
    "glyph_domains",
    "glyph_tasks",
    "glyphs",
    "hf_dataset",
    "image_folder",
    "load",
    "messages",
    "noise",
    "noise_sweep",
    "paired_tokens",
    "permuted_classes",
    "rotated_fashion",
    "shifted_fashion",
    "table",
]

DATASETS: dict[str, Callable[..., Splits]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "fashion-classes": fashion_classes,
    "rotated-fashion": rotated_fashion,
    "shifted-fashion": shifted_fashion,
    "edge-fashion": edge_fashion,
    "fashion-tasks": fashion_tasks,
    "fashion-clients": fashion_clients,
    "fashion-discovery": fashion_discovery,
    "fashion-search": fashion_search,
    "glyphs": glyphs,
    "glyph-domains": glyph_domains,
    "glyph-tasks": glyph_tasks,
    "image-folder": image_folder,
    "table": table,
    "hf": hf_dataset,
    "text": byte_text,
    "messages": messages,
    "documents": documents,
    "noise": noise,
    "noise-sweep": noise_sweep,
}
"""Loaders by the name that a recipe gives them."""


def load(name: str, /, **arguments: Any) -> Splits:
    """Load a data set by its recipe name: `load("digits", labels=50)`.

    Raises:
        InputError: unknown name or argument, and what the loader itself raises.
    """
    return call_named("data set", DATASETS, name, arguments)

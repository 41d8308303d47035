"""Text as bytes, for language models with a vocabulary of 256."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from transfuse.core.errors import InputError, StoreError
from transfuse.datasets.splits import Splits, cuts

MODULES = (
    "argparse",
    "ast",
    "calendar",
    "configparser",
    "dataclasses",
    "difflib",
    "doctest",
    "enum",
    "fractions",
    "functools",
    "gettext",
    "heapq",
    "inspect",
    "ipaddress",
    "mailbox",
    "optparse",
    "pickletools",
    "random",
    "shutil",
    "smtplib",
    "socket",
    "statistics",
    "subprocess",
    "tarfile",
    "textwrap",
    "threading",
    "traceback",
    "turtle",
    "typing",
)
"""Modules of CPython's standard library that are one long file each in every version."""


def byte_text(
    files: str | Path | Sequence[str | Path] | None = None,
    context: int = 128,
    fractions: Sequence[float] = (0.9, 0.05, 0.05),
    size: int | None = None,
) -> Splits:
    """Files as windows of bytes: data sets of one int64 tensor, samples `(context,)` of 0 to 255.

    The files are joined and cut into windows that do not overlap (a shorter rest is dropped). The first
    windows are train, the next ones validate, the last ones test.

    Args:
        files: text files of any encoding, in order; by default source code of Python's own standard library,
            about 1.9 MB, which differs a little between Python versions.
        context: bytes per window.
        fractions: train, validate and test; a fraction of 0 leaves the part out.
        size: take only so many windows to train on.

    Raises:
        StoreError: a file cannot be read.
        InputError: `context` below 1, wrong `fractions`, or text too short for one window in each part.
    """
    if context < 1:
        raise InputError(f"context must be at least 1 byte, found {context}")
    if files is None:
        library = Path(sysconfig.get_path("stdlib"))
        files = [library / f"{module}.py" for module in MODULES]
    elif isinstance(files, str | Path):
        files = [files]
    text = b"".join(read(Path(file)) for file in files)
    count = len(text) // context
    begins = cuts(count, fractions)
    if any(f > 0 and begin == end for f, (begin, end) in zip(fractions, pairwise(begins), strict=True)):
        raise InputError(
            f"{len(text)} bytes are {count} windows of {context}, too few to split by {tuple(fractions)}: "
            "bring more text, or set context= lower"
        )
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: count * context].view(count, context).long()
    train, validate, test = (TensorDataset(windows[begin:end]) for begin, end in pairwise(begins))
    if size is not None:
        train = TensorDataset(train.tensors[0][:size])
    return Splits(train, validate or None, test or None, name="text", task="language-model")


def read(file: Path) -> bytes:
    """The bytes of a file."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error}") from error

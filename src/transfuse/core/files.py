"""Writing files so that a killed process leaves the old content or the new, never half of either."""

from __future__ import annotations

import os
import re
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transfuse.core.errors import StoreError

_MASK = os.umask(0o022)
os.umask(_MASK)
_MODE = 0o666 & ~_MASK


@contextmanager
def temporary(path: str | Path) -> Iterator[Path]:
    """A neighbour of `path` to write to; it takes the place of `path` when the block ends well.

    Raises:
        StoreError: the folder is missing, the disk is full or not writable; `path` is as it was.
    """
    path = Path(path)
    # The neighbour's name is unique, so two writers cannot share it; the same folder makes the rename atomic.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.chmod(_MODE)  # some writers leave files that only their owner can read
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(
            f"could not write {path}: {error.strerror or error}. "
            f"Check that {path.parent} exists, is writable and has room; an older file is intact."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Replace the file at `path` by `content` (text is written as UTF-8, line ends untouched).

    Raises:
        StoreError: as :func:`temporary`.
    """
    with temporary(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def file_name(text: str) -> str:
    """The text with nothing in it that a file system, or a tracker of experiments, could refuse."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if len(name) <= 100 and text.isascii():
        return name
    return f"{name[:100]}-{zlib.crc32(text.encode()):08x}"  # what is left out still tells names apart


def make_folder(path: str | Path) -> None:
    """Make a folder and those above it; one that exists is fine.

    Raises:
        StoreError: it cannot be made, or a file is in its place.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the folder {path}: {error.strerror or error}. Choose another") from error


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

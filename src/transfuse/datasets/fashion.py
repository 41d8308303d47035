"""Fashion-MNIST, from the files of a Debian package or of the user."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from transfuse.core.errors import InputError, StoreError
from transfuse.datasets.splits import Splits, stratified

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SPLIT_SEED = 60_000


def fashion_mnist(
    folder: str | Path | None = None, labels: int | None = None, seed: int = 0, size: int | None = None
) -> Splits:
    """70,000 pictures of clothes: inputs float32 `(1, 28, 28)` in [0, 1], labels 0 to 9.

    (Xiao et al., 2017, arXiv:1708.07747.) Of the official 60,000 training pictures, 500 of each class are
    put aside to validate, always the same ones; the other 55,000 are in a fixed random order.

    Args:
        folder: where the four files are, gzip-compressed IDX under their official names; by default where
            Debian's package `dataset-fashion-mnist` puts them.
        labels: keep this many labels in train; None keeps all. See :meth:`Splits.few_labels`.
        seed: chooses the labels that are kept.
        size: take only the first `size` training pictures.

    Raises:
        StoreError: a file is missing, truncated or not what its name says.
        InputError: `size` is not between 1 and the number of training pictures.
    """
    folder = DEBIAN if folder is None else Path(folder)
    images, targets = read_pair(folder, "train")
    train, validate, _ = stratified(targets, (11 / 12, 1 / 12, 0), SPLIT_SEED)
    if size is not None:
        if not 1 <= size <= len(train):
            raise InputError(f"size must be between 1 and {len(train)} training pictures, found {size}")
        train = train[:size]
    splits = Splits(
        as_dataset(images[train], targets[train]),
        as_dataset(images[validate], targets[validate]),
        as_dataset(*read_pair(folder, "t10k")),
        CLASSES,
        "fashion-mnist",
    )
    return splits if labels is None else splits.few_labels(labels, seed)


def as_dataset(images: Tensor, targets: Tensor) -> TensorDataset:
    """Bytes `(samples, height, width)` to the inputs and labels of a model."""
    return TensorDataset(images.unsqueeze(1).float() / 255, targets.long())


def read_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images `(samples, height, width)` and labels `(samples,)` of one part, as bytes."""
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", dimensions=3)
    targets = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", dimensions=1)
    if len(images) != len(targets):
        raise StoreError(f"{folder} has {len(images)} {part} images but {len(targets)} {part} labels")
    return images, targets


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read a gzip-compressed IDX file of unsigned bytes.

    The format: two zero bytes, the element type (8: unsigned byte), the number of dimensions, each size as
    a big-endian 32-bit integer, then the elements.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise StoreError(
            f"Fashion-MNIST: there is no {path}. Either `apt install dataset-fashion-mnist`, or name with "
            "folder= where you have {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz"
        ) from error
    except (EOFError, OSError, zlib.error) as error:
        raise StoreError(f"{path} cannot be read ({error}): fetch it again") from error
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    if len(content) < header or content[:4] != magic:
        raise StoreError(
            f"{path} should be an IDX file of {dimensions}-dimensional bytes that begins with {magic.hex()}, "
            f"found {content[:4].hex()}"
        )
    sizes = [int.from_bytes(content[i : i + 4]) for i in range(4, header, 4)]
    if len(content) - header != math.prod(sizes):
        raise StoreError(
            f"{path} promises {' x '.join(map(str, sizes))} bytes and holds {len(content) - header}: fetch it again"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(sizes)

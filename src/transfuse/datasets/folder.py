"""Images in folders, one folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from transfuse.core.errors import InputError, MissingExtraError, ShapeError, StoreError, nearest
from transfuse.datasets.splits import Splits, stratified

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MODES = {1: "L", 3: "RGB"}
PARTS = ("train", "validate", "test")


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images that are read when asked for: float32 `(channels, height, width)` in [0, 1], and a label.

    Args:
        files: one per sample.
        labels: one per sample.
        size: every image is resized to `size` x `size` pixels; None keeps it, and then all must be as large
            as the first one asked for.
        channels: 3 for colour, 1 for grey; images are converted.

    Raises:
        StoreError: (on access) a file cannot be read as an image.
        ShapeError: (on access) without `size`, an image differs in size from the first.
    """

    def __init__(self, files: Sequence[Path], labels: Sequence[int], size: int | None, channels: int):
        self.files = list(files)
        self.labels = list(labels)
        self.size = size
        self.channels = channels
        self.shape: torch.Size | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file = self.files[index]
        image = read_image(file, self.size, self.channels)
        self.shape = self.shape or image.shape
        if image.shape != self.shape:
            raise ShapeError(
                f"{file} has shape {tuple(image.shape)}, other images have {tuple(self.shape)}: "
                "give size= to resize them"
            )
        return image, self.labels[index]


def image_folder(
    path: str | Path,
    size: int | None = None,
    channels: int = 3,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
) -> Splits:
    """Images in `path/train/CLASS/`, `path/validate/CLASS/`, `path/test/CLASS/`, or all in `path/CLASS/`.

    In the first layout validate and test may be absent; in the second the images are split at random, each
    class by the same fractions. Classes are numbered in the order of their names.

    Args:
        path: the folder.
        size: resize every image to `size` x `size` pixels; None keeps them, and then all must be of one size.
        channels: 3 for colour, 1 for grey; images are converted.
        fractions: train, validate and test, for the second layout; a fraction of 0 leaves the part out.
        seed: of the random split.

    Raises:
        StoreError: there is no such folder.
        InputError: fewer than two classes, a class without images, other classes in one part than in another,
            a folder beside train/validate/test that is none of them, or wrong `channels` or `fractions`.
        MissingExtraError: Pillow is not installed.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("pillow", "data", "image_folder") from error
    path = Path(path)
    if not path.is_dir():
        raise StoreError(f"there is no folder {path}")
    if channels not in MODES:
        raise InputError(f"channels is 1 (grey) or 3 (colour), found {channels}")
    # A folder named "train" that holds images is a class of trains.
    if subfolders(path / "train"):
        return already_split(path, size, channels)
    files, labels, classes = collect(path)
    train, validate, test = (
        ImageFolder([files[i] for i in part], [labels[i] for i in part], size, channels)
        for part in stratified(torch.tensor(labels), fractions, seed)
    )
    return Splits(train, validate or None, test or None, classes, path.name)


def already_split(path: Path, size: int | None, channels: int) -> Splits:
    """The layout with one folder per part."""
    parts: dict[str, ImageFolder] = {}
    classes: tuple[str, ...] = ()
    for folder in sorted(subfolders(path), key=lambda f: f.name != "train"):
        if folder.name not in PARTS:
            raise InputError(f"{folder} is no part of a data set; {nearest(folder.name, PARTS)}")
        files, labels, found = collect(folder)
        classes = classes or found
        if found != classes:
            odd = sorted(set(found) ^ set(classes))
            raise InputError(f"{path / 'train'} and {folder} must have the same class folders, differ in {odd}")
        parts[folder.name] = ImageFolder(files, labels, size, channels)
    return Splits(parts["train"], parts.get("validate"), parts.get("test"), classes, path.name)


def collect(path: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """The image files below `path/CLASS/`, their labels, and the classes."""
    folders = subfolders(path)
    if len(folders) < 2:
        raise InputError(
            f"{path} needs one folder of images for each of at least two classes, found {len(folders)} folders"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)
        if not found:
            raise InputError(f"the class folder {folder} has no images ({', '.join(SUFFIXES)})")
        files += found
        labels += [label] * len(found)
    return files, labels, tuple(f.name for f in folders)


def subfolders(path: Path) -> list[Path]:
    """The folders directly below `path`, by name, without hidden ones; none if it does not exist."""
    return sorted(f for f in path.glob("*") if f.is_dir() and not f.name.startswith("."))


def read_image(file: Path, size: int | None, channels: int) -> Tensor:
    """One image as float32 `(channels, height, width)` in [0, 1]."""
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image = opened.convert(MODES[channels])
    except (OSError, SyntaxError, ValueError) as error:
        raise StoreError(f"{file} cannot be read as an image ({error}): replace or remove it") from error
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, channels).permute(2, 0, 1).float() / 255

"""What a teacher says about augmented images, with the seeds of the views in the place of their pixels.

A record is an int32 seed, K float16 probabilities and K int16 classes, `4 + 4 * K` bytes: the augmentation under that
seed gives the view again, bit by bit. (TinyViT: Wu et al., 2022, arXiv:2207.10666.)

Beside them lie checksums: `epoch-N.crc` of each record, written last, and `images.crc` of each image, 4 bytes each.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from transfuse.core import rng
from transfuse.core.errors import InputError, StoreError
from transfuse.core.files import make_folder, temporary, write_atomically
from transfuse.core.outputs import call, find_logits, modes_kept
from transfuse.core.store.forms import NO_NUMBERS
from transfuse.core.store.shards import bytes_of
from transfuse.core.store.store import teacher_fingerprint

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""From an image and its own random numbers to a view; it must draw from nothing else."""
HEADER = "views.json"
CHECKSUM = np.dtype("<u4")


class ViewStore:
    """The stored answers about several views of every image.

    Args:
        folder: of the store.
        augment: as it was built with.

    Raises:
        StoreError: there is no store, an epoch of it is missing, has another size or is damaged, or the augmentation is
            another.
    """

    def __init__(self, folder: str | Path, augment: Augment):
        self.folder, self.augment = Path(folder), augment
        try:
            self.header: dict[str, Any] = json.loads((self.folder / HEADER).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"there is no store of views in {folder} ({error}): build one") from None
        if self.header["augment"] != _name(augment):
            raise StoreError(
                f"the views in {folder} were made by {self.header['augment']}, not by {_name(augment)}: other pixels"
            )
        self.k, self.classes, self.samples = (self.header[name] for name in ("k", "classes", "samples"))
        self.epochs: int = self.header["epochs"]
        self._images = self._map("images.crc", CHECKSUM)
        self._records = [self._map(f"epoch-{epoch}.bin", _record_type(self.k)) for epoch in range(self.epochs)]
        self._checksums = [self._map(f"epoch-{epoch}.crc", CHECKSUM) for epoch in range(self.epochs)]

    def __reduce__(self) -> Any:
        return ViewStore, (self.folder, self.augment)  # a worker maps the files itself

    @classmethod
    def build(
        cls,
        folder: str | Path,
        teacher: nn.Module,
        images: Tensor,
        augment: Augment,
        *,
        k: int = 10,
        epochs: int = 1,
        seed: int = 0,
        batch_size: int = 256,
    ) -> ViewStore:
        """Ask a teacher about `epochs` views of every image; epochs that are there already are kept.

        Args:
            images: `(samples, ...)`.
            k: probabilities that are kept, fewer than the classes.

        Raises:
            InputError: k is out of range, or the classes do not fit into 16 bits.
            StoreError: the folder holds views of something else, or cannot be written; or the teacher's answers are
                not numbers.
        """
        with torch.no_grad(), modes_kept(teacher):
            classes = find_logits(call(teacher.eval(), images[:1])).shape[-1]
        if not 1 <= k < classes:
            raise InputError(f"k must be at least 1 and below the teacher's {classes} classes, found {k}")
        if classes > 32767:
            raise InputError(f"classes are stored in 16 bits, and the teacher has {classes}: 32767 at most")
        asked = np.array([_asked(image) for image in images], CHECKSUM).tobytes()
        header = {
            "k": k,
            "classes": classes,
            "samples": len(images),
            "epochs": epochs,
            "seed": seed,
            "augment": _name(augment),
            "teacher": teacher_fingerprint(teacher),
            "images": zlib.crc32(asked),
        }
        path = Path(folder)
        make_folder(path)
        if (path / HEADER).exists():
            before = json.loads((path / HEADER).read_text(encoding="utf-8"))
            if different := [name for name in header if before.get(name) != header[name]]:
                raise StoreError(f"{path} holds views with another {' and '.join(different)}: choose another folder")
        else:
            write_atomically(path / HEADER, json.dumps(header, indent=2) + "\n")
        write_atomically(path / "images.crc", asked)
        for epoch in range(epochs):
            written, sums = path / f"epoch-{epoch}.bin", path / f"epoch-{epoch}.crc"
            if not (written.exists() and sums.exists()):
                checksums: list[int] = []
                with temporary(written) as partial, partial.open("wb") as file:
                    for rows in torch.arange(len(images)).split(batch_size):
                        records = _records(teacher, images[rows], rows, augment, k, seed, epoch)
                        checksums += [zlib.crc32(record.tobytes()) for record in records]
                        file.write(records.tobytes())
                write_atomically(sums, np.array(checksums, CHECKSUM).tobytes())
        return cls(path, augment)

    def read(self, epoch: int, sample: int) -> tuple[int, Tensor, Tensor]:
        """The seed of a view, and the kept probabilities and classes, `(k,)` each.

        Raises:
            StoreError: the record is damaged.
        """
        record = self._records[epoch][sample]
        if zlib.crc32(record.tobytes()) != self._checksums[epoch][sample]:
            path = self.folder / f"epoch-{epoch}.bin"
            raise StoreError(
                f"the answer about image {sample} in {path} is damaged: it does not agree with its checksum. Remove "
                "that file and build the store again"
            )
        values = torch.tensor(record["values"].astype(np.float32))
        return int(record["seed"]), values, torch.tensor(record["ids"].astype(np.int64))

    def dataset(self, images: Tensor, mixup: float = 0.0) -> Dataset[dict[str, Tensor]]:
        """Every view of every image with what the teacher said: `{"inputs", "values", "ids"}`, epochs in a row.

        Args:
            mixup: above 0, each view is mixed with another of its epoch: `share * view + (1 - share) * other`, where
                share is from Beta(mixup, mixup). Share and other follow from the view's seed, so they are replayed,
                too. What the teacher said about the other comes as `"other_values"` and `"other_ids"`, and `"share"`:
                targets are mixed as images are, since the teacher saw them apart.

        Raises:
            InputError: mixup is negative.
            StoreError: the number of images is another.
        """
        if mixup < 0:
            raise InputError(f"mixup is {mixup}: it is 0 (off) or the positive parameter of a Beta distribution")
        if len(images) != self.samples:
            raise StoreError(f"the views in {self.folder} are of {self.samples} images, found {len(images)}")
        return _Views(self, images, mixup)

    def require(self, sample: int, image: Tensor) -> None:
        """Check that this is the image that the teacher saw.

        Raises:
            StoreError: it is not.
        """
        if _asked(image) != self._images[sample]:
            raise StoreError(
                f"image {sample} is not what the teacher of the views in {self.folder} saw: it was edited, or the "
                "images stand in another order: build the store again on these images"
            )

    def view(self, image: Tensor, seed: int) -> Tensor:
        """The view of an image under a seed."""
        return self.augment(image, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def check(self, teacher: nn.Module, images: Tensor, count: int = 256) -> dict[str, float]:
        """Ask the teacher again: how far the stored probabilities are off, and how often the classes differ.

        What is not near zero is an augmentation that draws from elsewhere, or another teacher.
        """
        found = [self.read(0, i) for i in range(min(count, self.samples))]
        views = torch.stack([self.view(images[i], seed) for i, (seed, _, _) in enumerate(found)])
        with modes_kept(teacher):
            p, ids = find_logits(call(teacher.eval(), views)).softmax(-1).topk(self.k)
        values, stored = torch.stack([v for _, v, _ in found]), torch.stack([c for _, _, c in found])
        return {"difference": float((p - values).abs().mean()), "mismatches": float((ids != stored).float().mean())}

    def _map(self, name: str, kind: np.dtype[Any]) -> np.ndarray:
        path = self.folder / name
        size, written = path.stat().st_size if path.exists() else None, self.samples * kind.itemsize
        if size != written:
            raise StoreError(
                f"{path} has {'been removed' if size is None else f'{size} bytes'}, {written} were written: remove it "
                "and build the store again, the other epochs are kept"
            )
        return np.memmap(path, kind, mode="r")


class _Views(Dataset[dict[str, Tensor]]):
    def __init__(self, store: ViewStore, images: Tensor, mixup: float):
        self.store, self.images, self.mixup = store, images, mixup

    def __len__(self) -> int:
        return self.store.epochs * len(self.images)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        epoch, sample = divmod(number, len(self.images))
        seed, view, values, ids = self._one(epoch, sample)
        if not self.mixup:
            return {"inputs": view, "values": values, "ids": ids}
        draw = np.random.default_rng(rng.derive(seed, "mixup"))
        share, other = draw.beta(self.mixup, self.mixup), int(draw.integers(len(self.images)))
        _, second, other_values, other_ids = self._one(epoch, other)
        mixed = {"inputs": share * view + (1 - share) * second, "share": torch.tensor(share, dtype=torch.float32)}
        return {**mixed, "values": values, "ids": ids, "other_values": other_values, "other_ids": other_ids}

    def _one(self, epoch: int, sample: int) -> tuple[int, Tensor, Tensor, Tensor]:
        """Seed and view of an image, and what the teacher said about it."""
        self.store.require(sample, self.images[sample])
        seed, values, ids = self.store.read(epoch, sample)
        return seed, self.store.view(self.images[sample], seed), values, ids


@torch.no_grad()
def _records(
    teacher: nn.Module, images: Tensor, rows: Tensor, augment: Augment, k: int, seed: int, epoch: int
) -> np.ndarray:
    seeds = [rng.derive(seed, "view", epoch, row) % 2**31 for row in rows.tolist()]
    views = [augment(image, torch.Generator().manual_seed(s)) for image, s in zip(images, seeds, strict=True)]
    with modes_kept(teacher):
        kept = find_logits(call(teacher.eval(), torch.stack(views))).float().softmax(-1).topk(k)
    if (broken := kept.values.isnan().any(-1)).any():
        raise StoreError(f"what the teacher says about image {int(rows[broken][0])} is {NO_NUMBERS}")
    records = np.zeros(len(rows), _record_type(k))
    records["seed"], records["values"], records["ids"] = seeds, kept.values.numpy(), kept.indices.numpy()
    return records


def _asked(image: Tensor) -> int:
    return zlib.crc32(f"{image.dtype} {tuple(image.shape)}".encode() + bytes_of(image))


def _record_type(k: int) -> np.dtype[Any]:
    return np.dtype([("seed", "<i4"), ("values", "<f2", (k,)), ("ids", "<i2", (k,))])


def _name(augment: Augment) -> str:
    """What an augmentation is called, with the arguments that a partial or an object shows."""
    inner = getattr(augment, "func", augment)
    name = getattr(inner, "__qualname__", type(inner).__name__)
    return f"{name}{getattr(augment, 'args', ())}{getattr(augment, 'keywords', {})}"

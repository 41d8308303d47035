"""Records of bytes on disk, by sample id, in files that are whole or not there, and checked whenever they are read.

A shard is two files: the records, one after the other, which are mapped into memory, and an index that is written
last. The index holds for each record its sample's id, where it lies, how many tokens it speaks of, a hash of what the
teacher was asked, and a checksum.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from transfuse.core.batch import Batch
from transfuse.core.checkpoint import load_state, save_state
from transfuse.core.errors import StoreError
from transfuse.core.files import temporary


@dataclass(frozen=True)
class Record:
    """One sample's answer: its id, a hash of what was asked, how many tokens it speaks of, and the bytes."""

    sample: int
    asked: int
    tokens: int
    content: bytes


def shard_path(folder: Path, number: int) -> Path:
    """Of a shard's index; the records lie beside it, with the suffix `.bin`."""
    return folder / f"shard-{number:06d}.safetensors"


def write_shard(folder: Path, number: int, records: Iterable[Record]) -> int:
    """Write a shard and return its size in bytes; a shard that is there already is replaced.

    Raises:
        StoreError: the files cannot be written; nothing incomplete is left under their names.
    """
    rows: list[tuple[int, int, int, int, int]] = []
    path = shard_path(folder, number)
    end = 0
    with temporary(path.with_suffix(".bin")) as partial, partial.open("wb") as file:
        for record in records:
            file.write(record.content)
            end += len(record.content)
            rows.append((record.sample, record.asked, record.tokens, end, zlib.crc32(record.content)))
        file.flush()
    save_state(path, {"rows": torch.tensor(rows, dtype=torch.int64).view(-1, 5)})
    return end


class Shards:
    """The records of a complete store.

    Args:
        folder: where they lie.
        count: how many shards there must be.

    Raises:
        StoreError: a shard is missing, truncated or damaged, or a sample stands twice.
    """

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count
        self._maps: dict[int, np.ndarray] = {}
        missing = [i for i in range(count) if not shard_path(folder, i).exists()]
        if missing:
            raise StoreError(
                f"the store in {folder} is not complete: {len(missing)} of {count} shards are missing "
                f"({', '.join(map(str, missing[:5]))}): build it again, what is there is kept"
            )
        tables = [load_state(shard_path(folder, i))["rows"] for i in range(count)]
        for number, table in enumerate(tables):
            path, size = self._records(number), int(table[-1, 3]) if len(table) else 0
            found = path.stat().st_size if path.exists() else None
            if found != size:
                raise StoreError(
                    f"{path} has {'been removed' if found is None else f'{found} bytes'}, {size} were written: remove "
                    f"{shard_path(folder, number).name} and build the store again, the other shards are kept"
                )
        begins = [torch.cat([t.new_zeros(1), t[:-1, 3]]) if len(t) else t.new_zeros(0) for t in tables]
        shard = torch.repeat_interleave(torch.arange(count), torch.tensor([len(t) for t in tables]))
        whole = torch.cat([*(t for t in tables)])
        order = whole[:, 0].argsort()
        self.table = torch.cat([whole, torch.cat(begins)[:, None], shard[:, None]], 1)[order].contiguous()
        """`(samples, 7)`, by id: id, hash, tokens, end, checksum, begin, shard."""
        self.samples = self.table[:, 0].contiguous()
        if (twice := self.samples[1:][self.samples.diff() == 0]).numel():
            raise StoreError(f"sample {int(twice[0])} stands twice in the store in {folder}")

    @property
    def size(self) -> int:
        """Bytes of all records."""
        return sum(self._records(i).stat().st_size for i in range(self.count))

    def read(self, samples: Tensor, asked: list[int]) -> tuple[list[memoryview], list[int]]:
        """The records of these samples, and the number of tokens of each.

        Args:
            asked: a hash for each of what the teacher would be asked now.

        Raises:
            StoreError: a sample is not there, the teacher was asked something else, or bytes are damaged.
        """
        at = torch.searchsorted(self.samples, samples).clamp(max=len(self.samples) - 1)
        if (absent := samples[self.samples[at] != samples]).numel():
            raise StoreError(
                f"the store in {self.folder} has no answer for sample {int(absent[0])}; it holds {len(self.samples)}, "
                f"numbered {int(self.samples[0])} to {int(self.samples[-1])}: build it on the data you train on"
            )
        records, tokens = [], []
        for row, content in zip(self.table[at].tolist(), asked, strict=True):
            sample, then, count, end, checksum, begin, shard = row
            if then != content:
                raise StoreError(
                    f"sample {sample} is not what the teacher of the store in {self.folder} was asked: its text or "
                    "tokens were edited, or this is other data: build the store again on this data"
                )
            record = self._map(shard)[begin:end].data
            if len(record) != end - begin or zlib.crc32(record) != checksum:
                raise StoreError(
                    f"the answer for sample {sample} in {self._records(shard)} is damaged: it does not agree with its "
                    f"checksum. Remove {shard_path(self.folder, shard).name} and build the store again"
                )
            records.append(record)
            tokens.append(count)
        return records, tokens

    def _records(self, shard: int) -> Path:
        return shard_path(self.folder, shard).with_suffix(".bin")

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self._records(shard), np.uint8, mode="r")
        return self._maps[shard]


def bytes_of(tensor: Tensor) -> memoryview:
    """The content of a tensor of any type, row by row; of one in memory it is no copy."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def what_is_asked(batch: Batch) -> list[int]:
    """A hash of each sample's inputs, 63 bits; padding does not count.

    Tokens are read where an attention mask shows them; any other input is read whole, by name.
    """
    inputs = batch.inputs if isinstance(batch.inputs, Mapping) else {"inputs": batch.inputs}
    inputs = {name: value.cpu() for name, value in sorted(inputs.items())}
    real = inputs.pop("attention_mask", None) if "input_ids" in inputs else None
    found = []
    for row in range(batch.size):
        content = hashlib.blake2b(digest_size=8)
        for name, value in inputs.items():
            one = value[row]
            if real is not None and one.shape == real[row].shape:
                one = one[real[row].bool()]
            content.update(f"{name} {one.dtype} {tuple(one.shape)}".encode() + bytes_of(one))
        found.append(int.from_bytes(content.digest()) >> 1)
    return found

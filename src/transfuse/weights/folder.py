"""Checkpoints on disk: folders and files of safetensors, read tensor by tensor without loading them.

Pickled state dicts are read as well, whole and without running code (`weights_only`).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from transfuse.core.checkpoint import read_pickle
from transfuse.core.errors import InputError, StoreError
from transfuse.weights.checkpoint import Checkpoint, InMemory, Spec

INDEX = "model.safetensors.index.json"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""What safetensors calls types."""
HEADS = ("head", "embed_out")
EMBEDDINGS = ("embed", "wte", "wpe")
"""Parts of the names under which networks keep their output layer and their table of tokens."""


class Folder(Checkpoint):
    """Safetensors files, mapped into memory: what is not read is not loaded, and reading copies nothing.

    Args:
        path: a folder of Hugging Face's (`model.safetensors`, or shards with an index), or one `.safetensors` file.

    Raises:
        StoreError: there is none, a shard is missing, or a file is truncated or damaged; it is named.
        InputError: a tensor stands in two files, or is of a type that cannot be merged.
    """

    def __init__(self, path: Path, name: str | None = None):
        self.path = path
        self.name = name or str(path)
        self.folder = path if path.is_dir() else None
        self.files = _files(path)
        self._local = threading.local()
        self._where: dict[str, Path] = {}
        tensors: dict[str, Spec] = {}
        for file in self.files:
            opened = _opened(file)
            for key in opened.keys():  # noqa: SIM118
                if key in tensors:
                    raise InputError(f"{self.name}: {key!r} stands in {self._where[key].name} and in {file.name}")
                part = opened.get_slice(key)
                if part.get_dtype() not in DTYPES:
                    raise InputError(f"{self.name}: {key!r} is of type {part.get_dtype()}, which cannot be merged")
                tensors[key] = Spec(tuple(part.get_shape()), DTYPES[part.get_dtype()])
                self._where[key] = file
        self.config = _config(path)
        self.tensors = tensors
        self.tied = self._tied()

    def read(self, key: str) -> Tensor:
        if key not in self._where:
            self.require(key)
        file = self._where[key]
        # Each thread maps a file for itself, which costs nothing until it is read.
        opened: dict[str, Any] = self._local.__dict__
        if file.name not in opened:
            opened[file.name] = _opened(file)
        try:
            tensor: Tensor = opened[file.name].get_tensor(key)
        except SafetensorError as error:
            raise StoreError(f"cannot read {key!r} in {file}: the file is damaged ({error})") from None
        return tensor

    def _tied(self) -> dict[str, str]:
        """An output layer that is kept beside the table that it is tied to, and is the same.

        Raises:
            InputError: they differ, and the config says that they are tied.
        """
        if not (self.config or {}).get("tie_word_embeddings"):
            return {}
        tied = {}
        tables = [k for k in self.tensors if is_embedding(k)]
        for head in [k for k in self.tensors if _is_head(k)]:
            for table in tables:
                if self.tensors[head] == self.tensors[table]:
                    if not torch.equal(self.read(head), self.read(table)):
                        raise InputError(
                            f"{self.name}: config.json says that {head!r} and {table!r} are tied, and they differ: set "
                            "tie_word_embeddings to false there, or remove the one that is not used"
                        )
                    tied[head] = table
        self.tensors = {k: spec for k, spec in self.tensors.items() if k not in tied}
        return tied


def open_checkpoint(source: Any, name: str | None = None) -> Checkpoint:
    """Whatever holds weights, as a checkpoint: a path, a module, a state dict, or a checkpoint.

    Raises:
        StoreError: nothing readable is there.
        InputError: it is none of these.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, nn.Module | Mapping):
        return InMemory(source, name)
    if not isinstance(source, str | Path):
        raise InputError(
            f"weights are a path, a module or a state dict, found a {type(source).__name__}: pass a folder of "
            "safetensors, for instance"
        )
    path = Path(source)
    if path.suffix in PICKLES:
        return InMemory(read_pickle(path), name or str(path))
    if path.is_dir() and not _safetensors(path) and (pickles := sorted(path.glob("pytorch_model*.bin"))):
        state: dict[str, Tensor] = {}
        for file in pickles:
            state |= read_pickle(file)
        found = InMemory(state, name or str(path))
        found.config, found.folder = _config(path), path
        return found
    return Folder(path, name)


def is_embedding(key: str) -> bool:
    """Whether a tensor is a table that tokens or positions are looked up in, by its name."""
    return any(part in key for part in EMBEDDINGS) and not _is_head(key)


def _is_head(key: str) -> bool:
    return any(part in key for part in HEADS) and key.endswith("weight")


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise StoreError(f"cannot read {file}: it is missing, truncated or no safetensors file ({error})") from None


def _safetensors(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _files(path: Path) -> Sequence[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise StoreError(f"there is nothing at {path}: expected a folder with safetensors, or a file")
    if (path / INDEX).exists():
        try:
            names = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise StoreError(f"{path / INDEX} is damaged: {error}") from None
        if missing := [name for name in names if not (path / name).exists()]:
            raise StoreError(f"{path} lacks {missing[0]} of {len(names)} shards that {INDEX} names: copy it again")
        return [path / name for name in names]
    if not (found := _safetensors(path)):
        raise StoreError(f"{path} holds no safetensors files: expected model.safetensors, or shards with {INDEX}")
    if len(found) > 1 and (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    return found


def _config(path: Path) -> dict[str, Any] | None:
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.exists() or not path.is_dir():
        return None
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{file} is no JSON: {error}") from None
    return config

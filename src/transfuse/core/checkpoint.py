"""States on disk: nested dicts, lists and tensors as one safetensors file; nothing is ever unpickled.

A checkpoint is a folder with one file for what all processes share and one per process. It is written under
a temporary name and renamed when it is complete, so the last good one survives whatever happens.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from transfuse.core.errors import InputError, StoreError
from transfuse.core.files import make_folder, sync_folder, temporary

FORMAT = 1


def save_state(path: Path, state: Any) -> None:
    """Write a nested state (dicts, lists, tuples, tensors, numbers, strings, None) to one safetensors file.

    Raises:
        StoreError: the state holds something else, or the file cannot be written; an older file stays intact.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_pack(state, tensors))
    _write_tensors(path, tensors, {"transfuse": skeleton, "crc": _checksum(skeleton, tensors)})


def load_state(path: Path) -> Any:
    """Read what :func:`save_state` wrote, on the CPU.

    Raises:
        StoreError: the file is missing, truncated, altered in form, or not ours.
    """
    tensors, metadata = read_tensors(path)
    if "transfuse" not in metadata:
        raise StoreError(f"{path} is a safetensors file, but not one of a transfuse run")
    if metadata.get("crc") != _checksum(metadata["transfuse"], tensors):
        raise StoreError(f"{path} was altered after it was written: it does not agree with its checksum")
    return _unpack(json.loads(metadata["transfuse"]), tensors)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file.

    Raises:
        StoreError: the file is missing, truncated or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StoreError(f"cannot read {path}: it is missing, truncated or no safetensors file ({error})") from None


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a model's parameters and buffers as a plain safetensors file; tied tensors are written once."""
    state = model.state_dict()
    tied = tied_names(state)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items() if k not in tied}
    # One entry, for safetensors writes several in a random order, and equal models should be equal files.
    facts = {"tied": tied, "crc": _checksum(json.dumps(tied), tensors)}
    _write_tensors(path, tensors, {"weights": json.dumps(facts)})


def load_weights(path: Path | str, model: nn.Module) -> None:
    """Load weights into a model: a safetensors file, or a `.pt`/`.pth`/`.bin` state dict (tensors only).

    Raises:
        StoreError: the file is unreadable, or a pickle that would have to run code to be loaded.
        InputError: names or shapes do not fit the model; the first differences are listed.
    """
    path = Path(path)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        state = read_pickle(path)
    else:
        state, metadata = read_tensors(path)
        facts = json.loads(metadata.get("weights", "{}"))
        tied = facts.get("tied", {})
        if facts and facts["crc"] != _checksum(json.dumps(tied), state):
            raise StoreError(f"{path} was altered after it was written: it does not agree with its checksum")
        state |= {key: state[owner] for key, owner in tied.items()}
    own = model.state_dict()
    state |= {key: state[owner] for key, owner in tied_names(own).items() if key not in state and owner in state}
    differences = [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
    differences += [
        f"{k} is {tuple(state[k].shape)}, the model has {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if differences:
        shown = "; ".join(differences[:5]) + (f"; ... ({len(differences)} in all)" if len(differences) > 5 else "")
        raise InputError(f"the weights in {path} do not fit {type(model).__name__}: {shown}")
    model.load_state_dict(state)


class Checkpoints:
    """The checkpoints of one run: the newest complete one, and the one being written."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def newest(self) -> Path | None:
        """The folder of the newest complete checkpoint."""
        found = [(_number(p), p) for p in self.folder.glob("update-*")]
        return max([(number, p) for number, p in found if number], default=(None, None))[1]

    def save(self, update: int, shared: Any, own: Any, sync: Any) -> None:
        """Write a checkpoint; every process calls this. Older ones are removed once it is complete.

        Raises:
            StoreError: it could not be written; the older one is intact.
        """
        partial = self.folder / f"update-{update}.tmp"
        if sync.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            make_folder(partial)
        sync.barrier()
        if sync.rank == 0:
            save_state(partial / "shared.safetensors", {"format": FORMAT, "world": sync.world, "state": shared})
        save_state(partial / f"rank{sync.rank}.safetensors", own)
        sync.barrier()
        if sync.rank == 0:
            # The same update may come again, for instance right after a resume; the older one must stay until then.
            names = itertools.chain([f"update-{update}"], (f"update-{update}.{i}" for i in itertools.count(1)))
            final = next(path for path in map(self.folder.joinpath, names) if not path.exists())
            os.replace(partial, final)
            sync_folder(self.folder)
            for old in self.folder.glob("update-*"):
                if old != final:
                    gone = old.with_name("removed.tmp")  # a half removed one must not look complete
                    shutil.rmtree(gone, ignore_errors=True)
                    os.replace(old, gone)
                    shutil.rmtree(gone, ignore_errors=True)
        sync.barrier()

    def load(self, sync: Any) -> tuple[Any, Any] | None:
        """The shared and the own state of the newest checkpoint, or None where there is none.

        Raises:
            StoreError: it is unreadable, of another format, or was written by another number of processes.
        """
        newest = self.newest
        if newest is None:
            return None
        shared = load_state(newest / "shared.safetensors")
        if shared["format"] != FORMAT:
            raise StoreError(f"{newest} has checkpoint format {shared['format']}, this version reads {FORMAT}")
        if shared["world"] != sync.world:
            raise StoreError(
                f"{newest} was written by {shared['world']} process(es) and cannot go on with {sync.world}: "
                f"launch {shared['world']}"
            )
        return shared["state"], load_state(newest / f"rank{sync.rank}.safetensors")


def _number(path: Path) -> tuple[int, int] | None:
    """The update and repetition in a checkpoint's name; None for what is no complete checkpoint."""
    match = re.fullmatch(r"update-(\d+)(?:\.(\d+))?", path.name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def tied_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names that stand for the same memory as an earlier name, with that name."""
    first: dict[tuple[Any, ...], str] = {}
    owners = {k: first.setdefault((t.data_ptr(), t.shape, t.stride()), k) for k, t in state.items() if t.numel()}
    return {key: owner for key, owner in owners.items() if owner != key}


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Of the text and of every tensor: name, type, shape and bytes."""
    crc = zlib.crc32(text.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        crc = zlib.crc32(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        if tensor.numel():
            raw: Any = tensor.flatten().view(torch.uint8).numpy()
            crc = zlib.crc32(raw, crc)
    return str(crc)


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with temporary(path) as partial:
        try:
            save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The state dict in a pickle, read without running any code.

    Raises:
        StoreError: the file is missing or damaged, would have to run code, or holds no state dict.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StoreError(f"there is no file {path}") from None
    except Exception as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise StoreError(
                f"{path} is a pickle that runs code when it is loaded, so it is refused. If you trust whoever "
                "made it, convert it once: safetensors.torch.save_file(torch.load(path, weights_only=False)"
                ".state_dict(), 'model.safetensors')"
            ) from None
        raise StoreError(f"cannot read {path}: it is truncated or no checkpoint ({type(error).__name__})") from None
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise StoreError(f"{path} holds no state dict: expected a mapping from parameter names to tensors")
    return dict(state)


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Replace tensors by references and mark what JSON cannot tell apart."""
    if isinstance(value, Tensor):
        key = f"t{len(tensors)}"
        # A clone: tensors that share memory cannot be written side by side.
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {"dict": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [_pack(v, tensors) for v in value]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        return {"numpy": _pack(torch.from_numpy(value.astype("int64")), tensors), "dtype": str(value.dtype)}
    raise StoreError(f"a {type(value).__name__} cannot be saved in a checkpoint: use tensors, numbers, strings, lists")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "dict" in value:
            return {_unpack(k, tensors): _unpack(v, tensors) for k, v in value["dict"]}
        if "tuple" in value:
            return tuple(_unpack(v, tensors) for v in value["tuple"])
        if "numpy" in value:
            return _unpack(value["numpy"], tensors).numpy().astype(value["dtype"])
        return [_unpack(v, tensors) for v in value["list"]]
    return value

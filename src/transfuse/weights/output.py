"""Writing a merge: every tensor at its place in its file as soon as it is there, then what `from_pretrained` reads.

The files grow in `OUT.partial`, which takes the name `OUT` when everything is in it. Beside them a journal says which
tensors are done, with their checksums; a merge that was killed goes on behind it, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from transfuse.core.errors import InputError, StoreError
from transfuse.core.files import make_folder, sync_folder, write_atomically
from transfuse.weights.checkpoint import Checkpoint, Spec
from transfuse.weights.engine import PIECE, Plan
from transfuse.weights.folder import DTYPES, INDEX, Folder
from transfuse.weights.tokenizer_files import FILE as TOKENIZER
from transfuse.weights.tokenizer_files import cut, grown, renumbered, tokenizer_of

NAMES = {dtype: name for name, dtype in DTYPES.items()}
JOURNAL, CLAIM = "done.jsonl", "merge.json"
WITH_IDS = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "added_tokens.json")
"""Older forms of a tokenizer, which `tokenizer.json` stands for."""
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".md", ".lock")
"""Weights, and what speaks of them."""


def write(
    plan: Plan,
    out: Path,
    shard_size: int,
    workers: int,
    resume: bool,
    say: Callable[[str], None] | None,
    progress: Callable[[int, int], None] | None,
) -> Path:
    """Write a merge into a folder; see :func:`transfuse.weights.engine.merge`."""
    partial, claim = out.with_name(out.name + ".partial"), _claim(plan, shard_size)
    if resume and _read_claim(out).get("claim") == claim:
        return out  # it was finished
    require_new(out)
    described = _described(plan)
    shards = _shards(plan.specs, shard_size)
    fresh = not partial.exists()
    if not fresh:
        if not resume:
            raise InputError(f"{partial} is a merge that was not finished: go on with resume (--resume), or remove it")
        if _read_claim(partial).get("claim") != claim:
            raise InputError(f"{partial} is an unfinished merge of other things: remove it, or choose another folder")
    make_folder(partial)
    _require_room(plan, partial, shards)
    if say:
        say(_estimate(plan, shards, workers))
    if fresh:
        write_atomically(partial / CLAIM, json.dumps({"claim": claim}))
    files = [_File(partial / name, specs) for name, specs in shards.items()]
    where = {key: file for file in files for key in file.places}
    journal = _Journal(partial / JOURNAL)
    done = {key for key, crc in journal.done.items() if key in where and where[key].checksum(key) == crc}

    def put(key: str, pieces: Iterator[Tensor]) -> None:
        journal.add(key, where[key].put(key, pieces))

    try:
        plan.run(put, {k: spec for k, spec in plan.specs.items() if k not in done}, workers, progress)
        for file in files:
            file.sync()
    finally:
        for file in files:
            file.close()
        journal.close()
    _beside(plan, partial, shards, claim, described)
    (partial / JOURNAL).unlink()
    if out.exists():
        out.rmdir()
    os.replace(partial, out)
    sync_folder(out.parent)
    return out


def require_new(out: Path) -> None:
    """Raises: InputError: there is something in the folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty: choose another folder, or remove it")


class _File:
    """A safetensors file that is written out of order: its header first, then every tensor at its place."""

    def __init__(self, path: Path, specs: Mapping[str, Spec]):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.places: dict[str, tuple[int, int]] = {}
        end = 0
        for key, spec in specs.items():
            header[key] = {
                "dtype": NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [end, end + spec.bytes],
            }
            self.places[key] = end, end + spec.bytes
            end += spec.bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._first = 8 + len(text)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if os.fstat(self._file).st_size != self._first + end:
            os.ftruncate(self._file, self._first + end)
        _put(self._file, memoryview(len(text).to_bytes(8, "little") + text), 0)

    def put(self, key: str, pieces: Iterator[Tensor]) -> int:
        """Write a tensor; returns its checksum."""
        begin, end = self.places[key]
        at, crc = begin, 0
        for piece in pieces:
            if not piece.numel():
                continue
            flat: Any = piece.contiguous().view(torch.uint8).numpy()
            content = memoryview(flat)
            if at + len(content) > end:
                raise StoreError(f"the merged {key!r} is larger than its place, which has {end - begin} bytes")
            _put(self._file, content, self._first + at)
            crc = zlib.crc32(content, crc)
            at += len(content)
        if at != end:
            raise StoreError(f"the merged {key!r} has {at - begin} bytes, its place {end - begin}")
        with suppress(AttributeError, OSError):  # a system that can begins to write: the end has less to wait for
            os.posix_fadvise(self._file, self._first + begin, end - begin, os.POSIX_FADV_DONTNEED)
        return crc

    def checksum(self, key: str) -> int:
        """Of what stands at a tensor's place."""
        begin, end = self.places[key]
        crc = 0
        for at in range(begin, end, 4 * PIECE):
            crc = zlib.crc32(os.pread(self._file, min(4 * PIECE, end - at), self._first + at), crc)
        return crc

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


class _Journal:
    """Which tensors are written, a line each; a last line that was cut off does not count."""

    def __init__(self, path: Path):
        self.done: dict[str, int] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
                key, crc = json.loads(line)
                self.done[key] = crc
        self._file, self._lock = path.open("a", encoding="utf-8"), threading.Lock()
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")

    def add(self, key: str, crc: int) -> None:
        with self._lock:
            self._file.write(json.dumps([key, crc]) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _put(file: int, content: memoryview, at: int) -> None:
    while content:
        try:
            written = os.pwrite(file, content, at)
        except OSError as error:
            raise StoreError(f"the merge could not be written: {error.strerror}. Make room, then resume") from error
        content, at = content[written:], at + written


def _shards(specs: Mapping[str, Spec], size: int) -> dict[str, dict[str, Spec]]:
    """Which tensors go into which file, in order."""
    groups: list[dict[str, Spec]] = [{}]
    filled = 0
    for key, spec in specs.items():
        if filled and filled + spec.bytes > size:
            groups.append({})
            filled = 0
        groups[-1][key] = spec
        filled += spec.bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def _claim(plan: Plan, shard_size: int) -> dict[str, Any]:
    """What a merge is of; two that differ in it must not be mixed."""
    parents = [*plan.models, *(() if plan.base is None else (plan.base,))]
    return {
        "method": repr(plan.method),
        "shard_size": shard_size,
        "dtypes": sorted({str(spec.dtype) for spec in plan.specs.values()}),
        "parents": [_fingerprint(parent) for parent in parents],
    }


def _fingerprint(parent: Checkpoint) -> str:
    """Of names and shapes, and of the files' sizes and times, or of all bytes of what has no files."""
    content = hashlib.blake2b(digest_size=16)
    for key, spec in parent.tensors.items():
        content.update(f"{key} {spec.shape} {spec.dtype}".encode())
        if not isinstance(parent, Folder):
            content.update(parent.read(key).contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if isinstance(parent, Folder):
        for file in parent.files:
            found = file.stat()
            content.update(f"{file.name} {found.st_size} {found.st_mtime_ns}".encode())
    return content.hexdigest()


def _read_claim(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / CLAIM).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _require_room(plan: Plan, partial: Path, shards: Mapping[str, Mapping[str, Spec]]) -> None:
    there = sum((partial / name).stat().st_blocks * 512 for name in shards if (partial / name).exists())
    needed, free = plan.bytes - there + 2**20, shutil.disk_usage(partial).free
    if needed > free:
        if not any(partial.iterdir()):
            partial.rmdir()
        raise StoreError(
            f"the merge takes {needed / 2**30:.2f} GB, and {partial.parent} has {free / 2**30:.2f} GB left: make room, "
            "or choose another place or a smaller dtype"
        )


def _estimate(plan: Plan, shards: Mapping[str, Any], workers: int) -> str:
    """What it will take, from a piece of the largest tensor."""
    key = max(plan.specs, key=lambda k: plan.specs[k].bytes)
    began = time.perf_counter()
    entries = len(next(plan.pieces(key)))
    seconds = (time.perf_counter() - began) * sum(torch.Size(s.shape).numel() for s in plan.specs.values()) / entries
    return (
        f"{plan.method!r} of {len(plan.models)} models: {plan.bytes / 2**30:.2f} GB in {len(shards)} file(s), about "
        f"{plan.memory(workers) / 2**20:.0f} MB of memory, {seconds / workers:.0f} s of computing"
    )


def _described(plan: Plan) -> dict[str, Any]:
    """The files of the reference in which tokens stand, as they are with the merge's own, by name.

    Raises:
        VocabularyError: a tokenizer of these tokens would not work.
    """
    source, tokens = plan.reference.folder, plan.vocabulary
    if source is None or tokens is None:
        return {}
    if tokens.added < len(tokens.tokens):
        return {TOKENIZER: json.loads(grown(tokenizer_of(plan.reference), tokens.tokens, tokens.added).to_str())}
    if tokens.kept is None:
        return {}
    found = {TOKENIZER: cut(json.loads((source / TOKENIZER).read_text(encoding="utf-8")), tokens.kept)}
    if plan.reference.config is not None:
        found["config.json"] = renumbered(plan.reference.config, tokens.kept, "config.json")
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (source / name).exists():
            config = json.loads((source / name).read_text(encoding="utf-8"))
            found[name] = renumbered(config, tokens.kept, name)
    return found


def _beside(
    plan: Plan,
    folder: Path,
    shards: Mapping[str, Mapping[str, Spec]],
    claim: dict[str, Any],
    described: Mapping[str, Any],
) -> None:
    """Everything but the weights: config, tokenizer, index, the model card, and what was merged."""
    source, cut_down = plan.reference.folder, plan.vocabulary is not None and plan.vocabulary.kept is not None
    if source is not None:
        for file in sorted(source.iterdir()):
            stale = cut_down and file.name in WITH_IDS
            if not stale and file.is_file() and file.suffix not in NOT_COPIED and not file.name.endswith(INDEX[-11:]):
                shutil.copyfile(file, folder / file.name)
    for name, content in described.items():
        write_atomically(folder / name, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    if plan.reference.config is not None:
        config = dict(described.get("config.json", plan.reference.config))
        kinds = {str(s.dtype).removeprefix("torch.") for s in plan.specs.values() if s.dtype.is_floating_point}
        for name in ("dtype", "torch_dtype"):
            if name in config and len(kinds) == 1:
                config[name] = next(iter(kinds))
        write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": plan.bytes},
            "weight_map": {key: name for name, specs in shards.items() for key in specs},
        }
        write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")
    parents = [*plan.models, *(() if plan.base is None else (plan.base,))]
    recipe = {
        "method": repr(plan.method),
        "models": [model.name for model in plan.models],
        "base": None if plan.base is None else plan.base.name,
    }
    write_atomically(folder / "README.md", _card(parents, recipe))
    summary = {"claim": claim, "recipe": recipe, "ledger": plan.ledger.as_json()}
    write_atomically(folder / CLAIM, json.dumps(summary, indent=2) + "\n")


def _card(parents: list[Checkpoint], recipe: dict[str, Any]) -> str:
    """A model card: what was merged, under which licences, and how to do it again."""
    licences = {parent.name: _licence(parent) for parent in parents}
    same = set(licences.values())
    front = {
        "license": next(iter(same)) if len(same) == 1 else "other",
        "base_model": [parent.name for parent in parents],
        "tags": ["merge", "transfuse"],
    }
    rows = "\n".join(f"| {name} | {licence} |" for name, licence in licences.items())
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# A merge\n\n"
        f"| merged from | licence |\n|---|---|\n{rows}\n\n"
        "Licences are those that the models' own cards name; what no card names is unknown. The recipe, for "
        f"`transfuse merge`:\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```\n"
    )


def _licence(parent: Checkpoint) -> str:
    """What the front matter of a model's card says."""
    card = None if parent.folder is None else parent.folder / "README.md"
    if card is None or not card.exists():
        return "unknown"
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    try:
        front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        front = None
    return str(front.get("license", "unknown")) if isinstance(front, dict) else "unknown"

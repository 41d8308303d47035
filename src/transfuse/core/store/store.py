"""Building a store of a teacher's answers, and the source that reads it."""

from __future__ import annotations

import hashlib
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from transfuse.core import rng
from transfuse.core.batch import Batch, padding_mask
from transfuse.core.errors import InputError, StoreError
from transfuse.core.files import make_folder, write_atomically
from transfuse.core.output_layer import left_out, output_layer_and_logits
from transfuse.core.outputs import Features, Outputs, call, find_logits, full_precision, modes_kept
from transfuse.core.placement import device_of
from transfuse.core.store.forms import DTYPES, NO_NUMBERS, Dense, Draws, Form, Layers, form_of
from transfuse.core.store.shards import Record, Shards, bytes_of, shard_path, what_is_asked, write_shard
from transfuse.core.streams import Indexed, by_number
from transfuse.core.taps import Taps
from transfuse.core.teacher import Recorded
from transfuse.losses.scores import Projection, Sampled, Scores, TopK, in_parts

FORMAT = 1
HEADER = "store.json"
SHARD = 2048
"""Samples per shard: what is lost when a build is killed."""
CHUNK = 512
"""Tokens whose logits exist at a time."""


class TeacherStore(Recorded):
    """A source that answers from disk: it stands wherever a teacher can.

    Built once by :meth:`build`, it serves any number of students, and all methods that can learn from what was kept:
    full logits, top-k or drawn ones, or features of layers. An answer is found by the sample's id in the root data set
    and given only to what the teacher was asked; padding, order and batches may differ.

    Args:
        folder: of the store.
        tokenizer: the student's; compared with the one the store was built with.

    Raises:
        StoreError: there is no store, it is not complete, a file is damaged, or the tokenizer is another.
    """

    def __init__(self, folder: str | Path, tokenizer: Any = None):
        super().__init__()
        self.folder = Path(folder)
        self.header = _read_header(self.folder)
        self.form = form_of(self.header["keep"])
        self.classes, self.temperature = self.header["classes"], self.header["temperature"]
        self.gives = self.form.gives
        if tokenizer is not None and self.header["tokenizer"] not in (None, tokenizer_fingerprint(tokenizer)):
            raise StoreError(
                f"the store in {self.folder} was built with another tokenizer: its ids mean other tokens. Tokenise the "
                "data as the teacher's was, or build a store for this tokenizer"
            )
        self.shards = Shards(self.folder, self.header["shards"])
        content = hashlib.blake2b(json.dumps(self.header, sort_keys=True).encode(), digest_size=8)
        # So that runs can tell stores apart as they tell models apart.
        self.register_buffer("identity", torch.tensor(int.from_bytes(content.digest()) >> 1), persistent=False)

    def read(self, batch: Batch) -> Outputs:
        """The stored answers for a batch; for tokens, at the positions that are no padding."""
        if batch.index is None:
            raise StoreError(
                "samples are found in a store by their number, and this data has none: pass a data set, not a loader "
                "or iterator, or give each batch an 'index'"
            )
        records, tokens = self.shards.read(batch.index.cpu(), what_is_asked(batch))
        place = _placer(batch, tokens, self.header["by_token"])
        device = next((v.device for v in _tensors(batch)), torch.device("cpu"))
        if isinstance(self.form, Layers):
            return Outputs(None, Features(self._features(records, tokens, place, device)))
        found = self.form.unpack(records, tokens, self.classes, self.temperature)
        if isinstance(found, TopK | Sampled):
            return Outputs(found.on_samples(lambda value: place(value).to(device)))
        return Outputs(place(found).to(device))

    def _features(
        self, records: list[memoryview], tokens: list[int], place: Callable[[Tensor], Tensor], device: torch.device
    ) -> dict[str, Tensor]:
        dtype = np.dtype(DTYPES[self.form.dtype])  # type: ignore[attr-defined]
        found, begin = {}, [0] * len(records)
        for name, (by_token, shape) in self.header["layers"].items():
            rows = []
            for i, (record, count) in enumerate(zip(records, tokens, strict=True)):
                size = (count if by_token else 1) * math.prod(shape) * dtype.itemsize
                rows.append(record[begin[i] : begin[i] + size])
                begin[i] += size
            values = np.frombuffer(b"".join(rows), dtype).reshape(-1, *shape)
            whole = torch.from_numpy(values.astype(np.float32))
            found[name] = (place(whole) if by_token else whole).to(device)
        return found

    def __deepcopy__(self, memo: Any) -> TeacherStore:
        return self  # nothing in it changes

    def __reduce__(self) -> Any:
        return TeacherStore, (self.folder,)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        teacher: nn.Module,
        data: Any,
        keep: Form | None = None,
        *,
        task: str = "language-model",
        temperature: float = 1.0,
        batch_size: int = 16,
        tokenizer: Any = None,
        seed: int = 0,
        shard_size: int = SHARD,
        rank: int = 0,
        world: int = 1,
        say: Callable[[str], None] = print,
        progress: Callable[[int, int], None] | None = None,
    ) -> TeacherStore | None:
        """Ask a teacher about every sample once, and keep what it says. Killed and called again, it goes on.

        Args:
            teacher: run in eval mode, as it is, on its device.
            data: what students will be trained on, as :func:`transfuse.transfer` takes it: samples with a number.
            keep: what to keep of an answer; by default 50 draws per token.
            task: `"language-model"` or `"token-classification"`, which are answered by token, or `"classification"`.
            temperature: divides the logits. What is kept in part cannot be softened afterwards; all logits can, so
                they are kept as they are.
            batch_size: samples that the teacher reads at once.
            tokenizer: of the data; its fingerprint is kept, and compared with a student's.
            seed: of what is drawn; a sample's draws follow from it and the sample's id, whatever was killed.
            shard_size: samples per shard.
            rank, world: which of several processes this is; each writes its own shards.
            say: is told size and time before it begins, from the first batch.
            progress: called with the samples that are done, and all of them.

        Returns:
            The store, once every shard is there; None in a process whose peers are not done.

        Raises:
            StoreError: the folder holds a store of another teacher, tokenizer, data or form, or cannot be written.
            InputError: the data cannot be read by number, or the form does not fit the teacher.
        """
        stream = by_number(data)
        form, path = keep or Draws(), Path(folder)
        if not temperature > 0 or (temperature != 1 and isinstance(form, Dense | Layers)):
            raise InputError(
                f"temperature is {temperature}: it must be above 0, and 1 for {form}, whose answers a method divides "
                "by its own temperature"
            )
        builder = _Builder(teacher, stream, form, task, temperature, seed)
        shards = math.ceil(stream.size / shard_size)
        claim(
            path,
            stream,
            form,
            classes=builder.classes,
            teacher=teacher_fingerprint(teacher),
            tokenizer=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
            shard_size=shard_size,
            temperature=temperature,
            by_token=builder.by_token,
            layers=builder.layers,
            seed=seed,
        )
        mine = [i for i in range(rank, shards, world) if not shard_path(path, i).exists()]
        rows = [torch.arange(i * shard_size, min((i + 1) * shard_size, stream.size)) for i in mine]
        total, done = sum(map(len, rows)), 0
        first: list[Record] = []
        if total:
            began = time.monotonic()
            first = list(builder.records(rows[0][:batch_size]))
            say(_estimate(first, time.monotonic() - began, total))
        for number, part in zip(mine, rows, strict=True):

            def records(part: Tensor = part, ready: list[Record] = first) -> Iterator[Record]:
                nonlocal done
                for some in part.split(batch_size):
                    yield from ready or builder.records(some)
                    ready = []
                    done += len(some)
                    if progress:
                        progress(done, total)

            write_shard(path, number, records())
            first = []
        complete = all(shard_path(path, i).exists() for i in range(shards))
        return cls(path) if complete else None


class _Builder:
    """Asks the teacher and packs its answers."""

    def __init__(self, teacher: nn.Module, data: Indexed, form: Form, task: str, temperature: float, seed: int):
        self.teacher, self.data, self.form = teacher, data, form
        self.temperature, self.seed = temperature, seed
        self.by_token = task in ("language-model", "token-classification")
        self.device = device_of(teacher)
        self.room: Tensor | None = None
        first = data.fetch(torch.arange(1)).to(self.device)
        names = form.names if isinstance(form, Layers) else ()
        self.taps = Taps(teacher, names, first.inputs) if names else None
        self.layer, logits = (None, None) if names else output_layer_and_logits(teacher, first.inputs)
        self.layers: dict[str, Any] = {}
        if isinstance(form, Layers):
            outputs = self._ask(first)
            tokens = _tokens(first)[0] if self.by_token else 1
            for name, feature in outputs.features.items():
                inner = feature[0]
                along = self.by_token and not form.pooled and inner.dim() > 1 and inner.shape[0] >= tokens
                self.layers[name] = (along, list(inner.shape[1:] if along or self._pools(inner) else inner.shape))
            self.classes = 0
        else:
            shape = tuple((self._ask(first).scores if logits is None else logits).shape)
            self.classes = shape[-1]
            if len(shape) != (3 if self.by_token else 2):
                raise InputError(f"a store of task {task!r} cannot hold logits of shape {shape}")

    def _pools(self, feature: Tensor) -> bool:
        return isinstance(self.form, Layers) and self.form.pooled and self.by_token and feature.dim() > 1

    def records(self, rows: Tensor) -> Iterator[Record]:
        """The teacher's answers about some samples."""
        batch = self.data.fetch(rows)
        asked = what_is_asked(batch)
        moved = batch.to(self.device)
        outputs, real, samples = self._ask(moved), padding_mask(moved), batch.index.tolist()
        if isinstance(self.form, Layers):
            answers = [self._features(outputs, i, None if real is None else real[i]) for i in range(batch.size)]
        else:
            answers = self._kept(outputs.learning, real if self.by_token else None, samples)
        for sample, question, (content, tokens) in zip(samples, asked, answers, strict=True):
            yield Record(sample, question, tokens, content)

    @torch.no_grad()
    def _kept(self, scores: Scores, real: Tensor | None, samples: Sequence[int]) -> list[tuple[bytes, int]]:
        """The bytes of each sample, and of how many tokens; the output layer takes those of several samples at once."""
        each = scores.shape[1] if self.by_token else 1
        counts = [each] * len(samples) if real is None else real.sum(1).tolist()
        draws = [torch.Generator().manual_seed(rng.derive(self.seed, "draws", sample)) for sample in samples]
        nothing = torch.empty(0, self.classes)
        taken = [[self.form.take(nothing, draw)] for draw in draws]
        owners = torch.arange(len(samples)).repeat_interleave(torch.tensor(counts))
        if self.room is None and isinstance(scores, Projection):
            self.room = scores.hidden.new_empty(CHUNK, self.classes)
        for part, owner in zip(in_parts(scores, CHUNK, real, self.room), owners.split(CHUNK), strict=True):
            kept = full_precision(part).cpu()
            mine, sizes = owner.unique_consecutive(return_counts=True)
            for i, piece in zip(mine.tolist(), kept.split(sizes.tolist()), strict=True):
                # Nothing is divided by 1, for that takes as long as a part of the drawing.
                taken[i].append(self.form.take(piece if self.temperature == 1 else piece / self.temperature, draws[i]))
        found = []
        for sample, count, parts in zip(samples, counts, taken, strict=True):
            entries = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            if any(entry.isnan().any() for entry in entries.values()):
                raise StoreError(f"what the teacher says about sample {sample} is {NO_NUMBERS}")
            found.append((self.form.pack(entries), count))
        return found

    def _features(self, outputs: Outputs, i: int, real: Tensor | None) -> tuple[bytes, int]:
        assert isinstance(self.form, Layers)
        content, tokens = b"", 1 if not self.by_token else int(real.sum()) if real is not None else 0
        for name, feature in outputs.features.items():
            one = feature[i]
            along, _ = self.layers[name]
            if along or self._pools(one):
                one = one if real is None else one[real]
                tokens = len(one)
                one = one if along else one.sum(0) / max(tokens, 1)
            content += one.to(getattr(torch, self.form.dtype)).cpu().contiguous().numpy().tobytes()
        return content, tokens

    @torch.no_grad()
    def _ask(self, batch: Batch) -> Outputs:
        opened = self.taps.open() if self.taps else nullcontext(Features())
        with modes_kept(self.teacher), opened as features, left_out(self.layer) as projections:
            raw = call(self.teacher.eval(), batch.inputs)
        if self.taps:
            return Outputs(None, features)
        return Outputs(projections[-1] if projections else find_logits(raw))


def _estimate(first: Sequence[Record], seconds: float, samples: int) -> str:
    """What the whole build will take, from the first batch."""
    size, seconds = (whole / len(first) * samples for whole in (sum(len(r.content) for r in first), seconds))
    return f"store of {samples} samples: about {size / 2**20:.1f} MB, {seconds / 60:.1f} minutes"


def teacher_fingerprint(teacher: nn.Module) -> str:
    """A hash over the names, types, shapes and content of a model's parameters and buffers."""
    tensors = [(k, v) for k, v in sorted(teacher.state_dict().items()) if isinstance(v, Tensor) and not v.is_meta]
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda named: zlib.crc32(bytes_of(named[1])), tensors)
    content = hashlib.blake2b(type(teacher).__name__.encode(), digest_size=16)
    for (name, value), found in zip(tensors, sums, strict=True):
        content.update(f"{name} {value.dtype} {tuple(value.shape)} {found}".encode())
    return content.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash over which token has which number.

    Raises:
        InputError: it has no `get_vocab`.
    """
    if not hasattr(tokenizer, "get_vocab"):
        raise InputError(f"a tokenizer has get_vocab(), a {type(tokenizer).__name__} has not")
    pairs = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return hashlib.blake2b(json.dumps(pairs).encode(), digest_size=16).hexdigest()


def _read_header(folder: Path) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"there is no store in {folder} ({error}): build one with TeacherStore.build") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        raise StoreError(f"the store in {folder} has format {found}, this version reads {FORMAT}")
    if header.pop("checksum", None) != _checksum(header):
        raise StoreError(f"{folder / HEADER} does not agree with its checksum: it was edited or damaged, build again")
    return header


def _checksum(header: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(header, sort_keys=True).encode())


def claim(
    folder: Path,
    stream: Indexed,
    form: Form,
    *,
    classes: int,
    teacher: str,
    tokenizer: str | None,
    shard_size: int = SHARD,
    temperature: float = 1.0,
    by_token: bool = True,
    layers: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> None:
    """Write the header of a store, or check that the one that is there says the same.

    Raises:
        StoreError: the folder holds another store, or cannot be written.
    """
    make_folder(folder)
    header = {
        "format": FORMAT,
        "keep": form.as_header(),
        "classes": classes,
        "temperature": temperature,
        "by_token": by_token,
        "layers": layers or {},
        "teacher": teacher,
        "data": what_is_asked(stream.fetch(torch.tensor([0, stream.size - 1]))),
        "tokenizer": tokenizer,
        "seed": seed,
        "samples": stream.size,
        "shards": math.ceil(stream.size / shard_size),
        "shard_size": shard_size,
    }
    given = json.loads(json.dumps(header))
    if not (folder / HEADER).exists():
        write_atomically(folder / HEADER, json.dumps({**given, "checksum": _checksum(given)}, indent=2) + "\n")
        return
    before = _read_header(folder)
    if different := [k for k in given if before.get(k) != given[k]]:
        raise StoreError(
            f"{folder} holds a store with another {' and '.join(different)}: choose another folder, or remove it"
        )


def _tokens(batch: Batch) -> list[int]:
    """How many real tokens each sample has."""
    real = padding_mask(batch)
    if real is not None:
        return real.sum(1).tolist()
    tokens = batch.inputs["input_ids"] if isinstance(batch.inputs, Mapping) else batch.inputs
    return [tokens.shape[1]] * len(tokens)


def _placer(batch: Batch, tokens: list[int], by_token: bool) -> Callable[[Tensor], Tensor]:
    """Puts entries of all tokens, or samples, where they belong in the batch; padding is 0."""
    if not by_token:
        return lambda value: value
    real = padding_mask(batch)
    if real is None:
        return lambda value: value.view(len(tokens), -1, *value.shape[1:])
    there = real.cpu()

    def place(value: Tensor) -> Tensor:
        whole = value.new_zeros(*there.shape, *value.shape[1:])
        whole[there] = value
        return whole

    return place


def _tensors(batch: Batch) -> Iterator[Tensor]:
    values = batch.inputs.values() if isinstance(batch.inputs, Mapping) else [batch.inputs]
    return (v for v in values if isinstance(v, Tensor))

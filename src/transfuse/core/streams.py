"""Data in an order that is a pure function of (seed, stage, stream, epoch), so a position is two integers.

Three kinds of data: `Indexed` (tensors, map-style and Hugging Face data sets: we choose the order), `Iterated`
(the user's own DataLoader, list of batches or generator function: they do), and `Generated` (nothing is read;
it only says how long an epoch is). Every process sees the same order and takes its share of each update,
so the number of processes changes nothing a model sees.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from transfuse.core import rng
from transfuse.core.batch import Batch
from transfuse.core.errors import InputError
from transfuse.losses.reduction import IGNORE, mask_from_lengths

Adapt = Callable[[Any], Any]


class Data:
    """Something batches can be drawn from."""

    def updates(self, batch_size: int) -> int | None:
        """Updates per epoch; None for data without a length."""
        raise NotImplementedError

    def epoch(self, draw: Draw, start: int) -> Iterator[list[Batch]]:
        """The updates of an epoch from number `start` on, each as this process's micro-batches."""
        raise NotImplementedError

    def sample(self, size: int) -> Batch | None:
        """One real batch of at most `size` samples for setting up; None where there is nothing to read."""
        raise NotImplementedError

    def without_labels(self) -> Data:
        """The same data in the same order, for those who must not see its labels."""
        return self

    def shuffled_labels(self, seed: int) -> Data:
        """The same samples with their labels shuffled.

        Raises:
            InputError: they cannot be read by number.
        """
        raise InputError("labels can be shuffled only where samples are read by number: pass a data set, not a loader")


@dataclass(frozen=True)
class Draw:
    """How batches are drawn: what is chosen per run, and which share belongs to this process.

    Whatever is cut, is cut into parts that differ by one sample at most: epochs into updates of at most
    `batch_size`, an update into the shares of the processes, a share into micro-batches. So there is no small rest
    that batch normalisation or a batch-coupled loss could trip over.
    """

    batch_size: int
    micro_batch: int | None
    shuffle: bool
    seed: int
    rank: int = 0
    world: int = 1
    workers: int = 0

    def split(self, size: int) -> list[tuple[int, int]]:
        """Bounds of this process's micro-batches within an update of `size` samples."""
        start, stop = even(size, self.world)[self.rank]
        pieces = math.ceil((stop - start) / self.micro_batch) if self.micro_batch else 1
        return [(start + i, start + j) for i, j in even(stop - start, pieces)]


def even(size: int, parts: int) -> list[tuple[int, int]]:
    """Bounds of `parts` consecutive parts that differ in size by one at most."""
    return list(itertools.pairwise(size * i // parts for i in range(parts + 1)))


class Indexed(Data):
    """Samples by number: tensors are read by one index operation, other data sets sample by sample."""

    def __init__(self, dataset: Any, adapt: Adapt | None = None, collate: Callable[[list[Any]], Any] | None = None):
        self.root: Tensor | None = None
        self.relabelled: Tensor | None = None
        """Labels, by position, that take the place of the data set's own."""
        while isinstance(dataset, Subset):
            ids = torch.as_tensor(dataset.indices)
            self.root = ids if self.root is None else ids[self.root]
            dataset = dataset.dataset
        self.dataset, self.adapt, self.collate = dataset, adapt, collate
        self.tensors = _as_tensors(dataset) if adapt is None and collate is None else None
        if hasattr(dataset, "with_format") and getattr(dataset, "format", {}).get("type") is None:
            self.dataset = dataset.with_format("torch")
        self.size = len(self.root) if self.root is not None else _length(dataset, self.tensors)
        if self.size == 0:
            raise InputError("the data set is empty")

    def updates(self, batch_size: int) -> int:
        return math.ceil(self.size / batch_size)

    def fetch(self, rows: Tensor) -> Batch:
        """The batch of these rows; `index` holds their ids in the root data set."""
        ids = rows if self.root is None else self.root[rows]
        if self.tensors is not None:
            batch = Batch({k: _rows(v, ids) for k, v in self.tensors.items()})
        elif hasattr(self.dataset, "with_format"):
            batch = Batch.of(self._adapted(_ragged(self.dataset[ids.tolist()])))
        elif hasattr(self.dataset, "__getitems__"):
            batch = self._collated(self.dataset.__getitems__(ids.tolist()))
        else:
            batch = self._collated([self.dataset[i] for i in ids.tolist()])
        batch.setdefault("index", ids)
        if self.relabelled is not None:
            batch["labels"] = self.relabelled[rows]
        return batch

    def epoch(self, draw: Draw, start: int) -> Iterator[list[Batch]]:
        if draw.shuffle:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(draw.seed))
        else:
            order = torch.arange(self.size)
        updates = [
            [order[begin + i : begin + j] for i, j in draw.split(end - begin)]
            for begin, end in even(self.size, self.updates(draw.batch_size))[start:]
        ]
        if not draw.workers:
            for rows in updates:
                yield [self.fetch(r) for r in rows]
            return
        flat = [r for rows in updates for r in rows]
        loader = DataLoader(
            _Fetched(self, draw.seed),
            sampler=flat,
            batch_size=None,
            num_workers=draw.workers,
            generator=torch.Generator(),  # or opening it would draw from the run's, and once more after a resume
        )
        batches = iter(loader)
        for rows in updates:
            yield [next(batches) for _ in rows]

    def sample(self, size: int) -> Batch:
        return self.fetch(torch.arange(min(size, self.size)))

    def labelled(self) -> Indexed:
        """The samples that have a label, as control arms that may only use labels need them."""
        labels = self.all_labels()
        known = (labels != IGNORE).flatten(1).any(1) if labels.dim() > 1 else labels != IGNORE
        if not known.any():
            raise InputError("no sample of this data has a label, so nothing can be learned from labels alone")
        if known.all():
            return self
        return self.subset(known.nonzero().flatten())

    def subset(self, rows: Tensor) -> Indexed:
        """The samples with these numbers; `index` still holds their ids in the root data set."""
        return Indexed(Subset(self._root_dataset(), rows.tolist()), self.adapt, self.collate)

    def without_labels(self) -> Indexed:
        bare = copy.copy(self)
        if bare.tensors is not None:
            bare.tensors = Batch(bare.tensors).without_labels()
        bare.adapt = partial(_bare, bare.adapt)  # a subset reads the data set itself again
        return bare

    def shuffled_labels(self, seed: int) -> Indexed:
        """The same samples, each with the label of another one: a control that has a source, but no knowledge."""
        labels = self.all_labels()
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(rng.derive(seed, "shuffled labels")))
        other = copy.copy(self)
        other.relabelled = labels[order]
        return other

    def _root_dataset(self) -> Any:
        return self.dataset if self.root is None else Subset(self.dataset, self.root.tolist())

    @property
    def ids(self) -> Tensor:
        """The `index` of every sample, in the order of the samples."""
        ids = torch.arange(self.size) if self.root is None else self.root
        return ids if self.tensors is None or "index" not in self.tensors else self.tensors["index"][ids]

    def all_labels(self) -> Tensor:
        """The labels of every sample, in the order of the samples.

        Raises:
            InputError: there are none.
        """
        if self.tensors is not None:
            labels = self.tensors.get("labels")
            if labels is None:
                raise InputError("this data has no labels, so nothing can be learned from labels alone")
            return labels if self.root is None else labels[self.root]
        found = [self.fetch(rows).labels for rows in torch.arange(self.size).split(256)]
        if found[0] is None:
            raise InputError("this data has no labels, so nothing can be learned from labels alone")
        return torch.cat(found)

    def _adapted(self, item: Any) -> Any:
        return item if self.adapt is None else self.adapt(item)

    def _collated(self, samples: list[Any]) -> Batch:
        return Batch.of(self._adapted((self.collate or collate)(samples)))


class Iterated(Data):
    """Batches that somebody else makes: a DataLoader, a list, or a function that returns an iterator.

    A batch is an update; `micro_batch` cuts it. Reading has random generators of its own, seeded when an epoch
    starts: a shuffling, augmenting loader gives the same batches in every process and after a resume.
    """

    def __init__(self, batches: Iterable[Any] | Callable[[], Iterable[Any]], adapt: Adapt | None = None):
        self.batches, self.adapt = batches, adapt
        self.once = isinstance(batches, Iterator)
        self._head: list[Any] = []

    def updates(self, batch_size: int) -> int | None:
        try:
            count = len(self.batches) if isinstance(self.batches, Sized) else None
        except TypeError:
            return None
        if count == 0:
            raise InputError("the data is empty: it has no batch")
        return count

    def epoch(self, draw: Draw, start: int) -> Iterator[list[Batch]]:
        own = rng.Generators(draw.seed)  # for opening and reading, not for `adapt`
        sampler = getattr(self.batches, "sampler", None)
        for generator in (getattr(self.batches, "generator", None), getattr(sampler, "generator", None)):
            if generator is not None:
                generator.manual_seed(draw.seed)
        with own:
            items = self._open()
        for number in itertools.count():
            with own:
                item = next(items, None)
            if item is None:
                return
            if number >= start:
                batch = self._read(item)
                if batch.size < draw.world:
                    raise InputError(
                        f"batch {number} holds {batch.size} sample(s), fewer than the {draw.world} processes: "
                        "use larger batches, and drop the last incomplete one"
                    )
                yield [batch.slice(i, j) for i, j in draw.split(batch.size)]

    def sample(self, size: int) -> Batch:
        with rng.scope():
            items = self._open()
            item = next(items, None)
        if item is None:
            raise InputError("the data is empty: it has no batch")
        if self.once:
            self._head = [item]
        batch = self._read(item)
        return batch.slice(0, min(size, batch.size))

    def without_labels(self) -> Iterated:
        bare = copy.copy(self)
        bare.adapt = partial(_bare, bare.adapt)
        return bare

    def _open(self) -> Iterator[Any]:
        source = self.batches() if callable(self.batches) else self.batches
        head, self._head = self._head, []
        return itertools.chain(head, source)

    def _read(self, item: Any) -> Batch:
        return Batch.of(item if self.adapt is None else self.adapt(item))


@dataclass(frozen=True)
class Generated(Data):
    """No data is read: the method makes its own, `length` updates an epoch.

    A batch holds nothing but `index`, the numbers of its samples within the update. So its size says how many samples
    a method has to make, and terms can count them.
    """

    length: int

    def updates(self, batch_size: int) -> int:
        return self.length

    def epoch(self, draw: Draw, start: int) -> Iterator[list[Batch]]:
        for _ in range(start, self.length):
            yield [Batch(index=torch.arange(i, j)) for i, j in draw.split(draw.batch_size)]

    def sample(self, size: int) -> None:
        return None


def by_number(value: Any) -> Indexed:
    """Data whose samples have a number.

    Raises:
        InputError: it is a loader or an iterator, or no data.
    """
    data = as_data(value)
    if not isinstance(data, Indexed):
        raise InputError("a store is read by the number of a sample: pass a data set, not a loader or an iterator")
    return data


def as_data(value: Any, adapt: Adapt | None = None, collate: Callable[[list[Any]], Any] | None = None) -> Data:
    """Whatever a user has, as data.

    Accepts a map-style data set (torch, Hugging Face, or anything with `len` and `[i]`), a tensor or tuple or
    mapping of tensors, a DataLoader, a list of batches, an iterator, or a function returning an iterator.

    Raises:
        InputError: it is none of these, or empty.
    """
    if isinstance(value, Data):
        return value
    if isinstance(value, DataLoader):
        return Iterated(value, adapt)
    if _as_tensors(value) is not None:
        return Indexed(value, adapt, collate)
    if isinstance(value, list) and value and _is_batch(value[0]):
        return Iterated(value, adapt)
    if hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, str | Mapping):
        return Indexed(value, adapt, collate)
    if hasattr(value, "train") and hasattr(value, "validate"):
        raise InputError("these are all splits of a data set: pass one, for instance data=splits.train")
    if isinstance(value, IterableDataset):
        raise InputError("an IterableDataset yields single samples: wrap it in a DataLoader with a batch_size")
    if isinstance(value, Iterable) or callable(value):
        if isinstance(value, str | Mapping):
            raise InputError(f"cannot read data from a {type(value).__name__}: expected tensors as its values")
        return Iterated(value, adapt)
    raise InputError(
        f"cannot read data from a {type(value).__name__}: expected a data set, tensors, a DataLoader, "
        "a list of batches, or a function that returns an iterator of batches"
    )


@dataclass
class Stream:
    """Data with the way it is drawn. `None` means: as the caller asked.

    The first stream of a stage defines its epochs; others start again when they end.
    """

    data: Data
    batch_size: int | None = None
    shuffle: bool = True


class Cursor:
    """A position in a stream that can be saved: an epoch and a number of updates.

    Raises:
        InputError: the data is smaller than a batch, or an update smaller than the number of processes.
    """

    def __init__(self, data: Data, draw: Draw, name: str):
        if isinstance(data, Indexed):
            if data.size < draw.batch_size:
                raise InputError(
                    f"the data of {name!r} has {data.size} samples, fewer than one batch of {draw.batch_size}: "
                    f"use batch_size={data.size} or less"
                )
            smallest = data.size // data.updates(draw.batch_size)
            if smallest < draw.world:
                raise InputError(
                    f"{data.size} samples of {name!r} in batches of {draw.batch_size} are updates of {smallest}, fewer "
                    f"than the {draw.world} processes: choose a larger batch_size"
                )
        self.data, self.draw, self.name = data, draw, name
        self.epoch, self.offset = 0, 0
        self._updates: Iterator[list[Batch]] | None = None

    def next(self) -> list[Batch]:
        """This process's micro-batches of the next update."""
        for _ in range(2):
            if self._updates is None:
                draw = replace(self.draw, seed=rng.derive(self.draw.seed, self.name, self.epoch))
                self._updates = self.data.epoch(draw, self.offset)
            micro = next(self._updates, None)
            if micro is not None:
                self.offset += 1
                return micro
            self.epoch, self.offset, self._updates = self.epoch + 1, 0, None
            if isinstance(self.data, Iterated) and self.data.once:
                break
        raise InputError(
            f"the data of stream {self.name!r} has ended: an iterator can be read only once; "
            "pass a function that returns a new one, a list, or a DataLoader"
        )

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"epoch": self.epoch, "offset": self.offset}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position."""
        self.epoch, self.offset, self._updates = state["epoch"], state["offset"], None


def _bare(adapt: Adapt | None, item: Any) -> Batch:
    return Batch.of(item if adapt is None else adapt(item)).without_labels()


def collate(samples: list[Any]) -> Any:
    """Stack samples; rows of different length are padded and get an attention mask from their lengths."""
    if isinstance(samples[0], Mapping):
        columns = {
            k: [torch.as_tensor(s[k]) for s in samples] for k in samples[0] if not isinstance(samples[0][k], str)
        }
        return _ragged(columns)
    return default_collate(samples)


def _ragged(columns: Mapping[str, Any]) -> dict[str, Any]:
    ready: dict[str, Any] = {}
    for name, rows in columns.items():
        if isinstance(rows, Tensor) or not isinstance(rows, list) or not isinstance(rows[0], Tensor):
            ready[name] = rows
        elif all(r.shape == rows[0].shape for r in rows):
            ready[name] = torch.stack(rows)
        else:
            fill = IGNORE if name.startswith("label") else 0
            ready[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
            if name == "input_ids":
                lengths = torch.tensor([len(r) for r in rows])
                ready.setdefault("attention_mask", mask_from_lengths(lengths, ready[name].shape[1]).long())
    return ready


class _Fetched(Dataset[Batch]):
    """Batches by their rows, for worker processes: what augmentation draws depends on the rows, not on the worker."""

    def __init__(self, data: Indexed, seed: int):
        self.data, self.seed = data, seed

    def __getitem__(self, rows: Any) -> Batch:
        seed = rng.derive(self.seed, *rows.tolist())
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        return self.data.fetch(rows)


def _as_tensors(value: Any) -> dict[str, Any] | None:
    if isinstance(value, TensorDataset):
        value = value.tensors
    if isinstance(value, Tensor):
        return {"inputs": value}
    if isinstance(value, tuple):
        value = tuple(torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in value)
    if isinstance(value, tuple) and 1 <= len(value) <= 2 and all(isinstance(v, Tensor) for v in value):
        if len(value) == 2 and len(value[0]) != len(value[1]):
            raise InputError(f"{len(value[0])} inputs but {len(value[1])} labels")
        return dict(zip(("inputs", "labels"), value, strict=False))
    columns = _flat(value) if isinstance(value, Mapping) and "inputs" in value else value
    if isinstance(columns, Mapping) and columns and all(isinstance(v, Tensor) for v in columns.values()):
        sizes = {k: len(v) for k, v in columns.items()}
        if len(set(sizes.values())) > 1:
            raise InputError(f"tensors of one data set differ in length: {sizes}")
        return dict(Batch.of(value))
    return None


def _flat(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns by name, those of mappings among them (inputs, and inputs of the source's own) each by its own."""
    found: dict[str, Any] = {}
    for name, value in columns.items():
        found |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return found


def _rows(value: Any, ids: Tensor) -> Any:
    return {k: v[ids] for k, v in value.items()} if isinstance(value, Mapping) else value[ids]


def _length(dataset: Any, tensors: dict[str, Any] | None) -> int:
    if tensors is None:
        return len(dataset)
    return Batch(tensors).size


def _is_batch(item: Any) -> bool:
    """Whether a list's element is a batch of its own: its tensors have a batch axis and agree on it."""
    if isinstance(item, Batch):
        return True
    values = (
        list(item.values()) if isinstance(item, Mapping) else list(item) if isinstance(item, tuple | list) else [item]
    )
    tensors = [v for v in values if isinstance(v, Tensor)]
    if not tensors or any(t.dim() == 0 for t in tensors) or len(tensors) != len(values):
        return False
    return any(t.dim() > 1 for t in tensors) and len({len(t) for t in tensors}) == 1

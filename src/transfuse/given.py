"""What a caller hands to a transfer, whatever the family: read into streams, roles and held-out sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from transfuse.core.batch import LABEL_NAMES, Batch
from transfuse.core.errors import InputError
from transfuse.core.streams import Adapt, Data, Draw, Indexed, as_data
from transfuse.core.teacher import as_teacher

Collate = Callable[[list[Any]], Any]


class HeldOut(Data):
    """Several sets that are scored one after the other: tasks, clients, domains, pools.

    Their batches say as `task` which set they are from, so a model with a head for each can choose its own.
    """

    def __init__(self, sets: Mapping[str, Data]):
        self.sets = dict(sets)
        self.names = tuple(self.sets)

    @property
    def size(self) -> int:
        """Samples in all sets whose size is known."""
        return sum(data.size for data in self.sets.values() if isinstance(data, Indexed))

    def updates(self, batch_size: int) -> int | None:
        counts = [data.updates(batch_size) for data in self.sets.values()]
        return None if None in counts else sum(count for count in counts if count)

    def epoch(self, draw: Draw, start: int) -> Iterator[list[Batch]]:
        for number, data in enumerate(self.sets.values()):
            for micro in data.epoch(draw, 0):
                yield [_of_task(batch, number) for batch in micro]

    def sample(self, size: int) -> Batch | None:
        sample = next(iter(self.sets.values())).sample(size)
        return sample and _of_task(sample, 0)

    def without_labels(self) -> HeldOut:
        return HeldOut({name: data.without_labels() for name, data in self.sets.items()})


def _of_task(batch: Batch, number: int) -> Batch:
    return Batch(batch, task=torch.full((batch.size,), number))


def read_streams(data: Any, adapt: Adapt | None, collate: Collate | None) -> dict[str, Data]:
    """Training data by stream: one data set is `"data"`, a mapping has its own names, a list is numbered.

    Raises:
        InputError: something in it is no data.
    """
    if data is None:
        return {}
    if isinstance(data, Mapping) and not is_tensors(data):
        return {str(name): read("data", name, value, adapt, collate) for name, value in data.items()}
    if is_several(data):
        return {str(i): read("data", i, value, adapt, collate) for i, value in enumerate(data)}
    return {"data": read("data", None, data, adapt, collate)}


def read_held_out(what: str, data: Any, adapt: Adapt | None, collate: Collate | None) -> Data | None:
    """One data set, or several as a :class:`HeldOut`.

    Raises:
        InputError: something in it is no data, or there is no set in it.
    """
    if data is None:
        return None
    if isinstance(data, Mapping) and not is_tensors(data):
        sets = data
    elif is_several(data):
        sets = {str(i): value for i, value in enumerate(data)}
    else:
        return read(what, None, data, adapt, collate)
    if not sets:
        raise InputError(f"{what} is an empty {type(data).__name__}: expected at least one set in it")
    return HeldOut({str(name): read(what, name, value, adapt, collate) for name, value in sets.items()})


def read_sources(source: Any) -> dict[str, nn.Module]:
    """Source models by role: one is `"source"`, several are `"source.0"`, ... or `"source.<name>"`.

    Raises:
        InputError: one is neither a model nor a function, or one stands twice.
    """
    if source is None:
        return {}
    if isinstance(source, Mapping):
        named = {f"source.{name}": model for name, model in source.items()}
    elif isinstance(source, Sequence):
        named = {f"source.{i}": model for i, model in enumerate(source)}
    else:
        named = {"source": source}
    if not named:
        raise InputError(f"source is an empty {type(source).__name__}: expected at least one model in it")
    if len({id(model) for model in named.values()}) < len(named):
        raise InputError("the same model stands twice among the sources: pass copies, or each once")
    return {role: as_teacher(model) for role, model in named.items()}


def read(what: str, name: object, value: Any, adapt: Adapt | None, collate: Collate | None) -> Data:
    """One data set; errors say which it was."""
    try:
        return as_data(value, adapt, collate)
    except InputError as error:
        raise InputError(f"{what}{'' if name is None else f' {name!r}'}: {error}") from error


def is_tensors(value: Mapping[str, Any]) -> bool:
    """Whether a mapping is one data set, and not several by their names."""
    if not all(isinstance(v, Tensor | Mapping) for v in value.values()):
        return False
    return any(key in value for key in ("inputs", "input_ids", *LABEL_NAMES))


def is_several(value: Any) -> bool:
    """Whether a list holds data sets (tasks, clients), and not samples or batches."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(v, Dataset | Data | DataLoader) or hasattr(v, "with_format") for v in value)
    )

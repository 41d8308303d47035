"""What a measure of transfer is, and what it returns."""

from __future__ import annotations

import base64
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError, ShapeError
from transfuse.core.probe import no_trace
from transfuse.core.streams import Draw, as_data
from transfuse.measure.interval import Interval

SHOWN = 8
"""How many images of a kind a report's panel has."""


class Measure(ABC):
    """A way to look at models and data that says something about a transfer, and changes nothing.

    Parameters, buffers, modes and gradients of the models and the global random numbers are the same afterwards.
    Arguments of `__init__` are kept as attributes of the same name, as those of a method are.
    """

    card: ClassVar[Card] = Card(paper="not given")
    family: ClassVar[str] = "measure"

    def measure(self, *, source: Any, target: Any = None, data: Any = None, seed: int = 0) -> Measurement:
        """Look at a source and a target on data. All by name, because scores with swapped roles look right.

        Args:
            source: what the knowledge comes from; what may stand here is said by each measure.
            target: what it goes to.
            data: what both are looked at with.
            seed: of random numbers that the measure draws.

        Raises:
            InputError: something cannot stand where it stands; the message says what can.
        """
        models = dict.fromkeys(m for value in (source, target) for m in _models(value))
        with no_trace(*models, seed=seed):
            for model in models:
                model.eval()
            return self.look(source, target, data)

    @abstractmethod
    def look(self, source: Any, target: Any, data: Any) -> Measurement:
        """The measurement itself; every model is in eval mode, and is put back afterwards."""

    def __repr__(self) -> str:
        defaults = {n: p.default for n, p in inspect.signature(type(self)).parameters.items()}
        given = [f"{n}={getattr(self, n)!r}" for n, default in defaults.items() if getattr(self, n) != default]
        return f"{type(self).__name__}({', '.join(given)})"


@dataclass(frozen=True, eq=False)
class Table:
    """Numbers with names to both sides.

    Raises:
        ShapeError: `values` is not `(rows, columns)`.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Tensor

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.rows), len(self.columns)):
            raise ShapeError(
                f"a table of {len(self.rows)} rows and {len(self.columns)} columns cannot hold values of shape "
                f"{tuple(self.values.shape)}"
            )

    def __getitem__(self, place: tuple[str, str]) -> float:
        row, column = place
        return float(self.values[self.rows.index(row), self.columns.index(column)])

    def column(self, name: str) -> dict[str, float]:
        """One column, by row."""
        return dict(zip(self.rows, self.values[:, self.columns.index(name)].tolist(), strict=True))

    def as_dict(self) -> dict[str, Any]:
        values = [[_number(v) for v in row] for row in self.values.tolist()]
        return {"rows": list(self.rows), "columns": list(self.columns), "values": values}


@dataclass(frozen=True, eq=False)
class Measurement:
    """What a measure found.

    Attributes:
        measure: which, with its arguments.
        numbers: by name.
        intervals: of those numbers that have one.
        tables: by name, for instance one value per pair of languages.
        images: by name, `(images, height, width)` in [0, 1], for a report's panels.
        notes: what was left out, and what a number does not mean.
    """

    measure: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    images: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __getitem__(self, name: str) -> float:
        return self.numbers[name]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are not finite are None, images are bytes in base64 with their shape."""
        return {
            "measure": self.measure,
            "numbers": {name: _number(value) for name, value in self.numbers.items()},
            "intervals": {name: interval.as_dict() for name, interval in self.intervals.items()},
            "tables": {name: table.as_dict() for name, table in self.tables.items()},
            "images": {name: _pixels(image) for name, image in self.images.items()},
            "notes": list(self.notes),
        }

    def panels(self) -> list[dict[str, Any]]:
        """The tables and the first images for a report, in the shape of `transfuse.report.panels`."""
        note = " ".join(f"{n}." for n in self.notes)
        found = [
            {"kind": "matrix", "title": f"{self.measure}: {name}", "note": note, **table.as_dict()}
            for name, table in self.tables.items()
        ]
        for name, images in self.images.items():
            shown = [
                {"title": str(i), "pixels": [[_number(v) or 0.0 for v in row] for row in image.tolist()]}
                for i, image in enumerate(images[:SHOWN])
            ]
            found.append({"kind": "images", "title": f"{self.measure}: {name}", "note": note, "images": shown})
        return found


def batches(data: Any, batch_size: int, device: torch.device | None = None) -> Iterator[Batch]:
    """The batches of any data, in order.

    Raises:
        InputError: it is no data.
    """
    if data is None:
        raise InputError("a measure looks at models with data: pass data=")
    for micro in as_data(data).epoch(Draw(batch_size, None, shuffle=False, seed=0), 0):
        for batch in micro:
            yield batch if device is None else batch.to(device)


def named_models(value: Any, role: str) -> dict[str, nn.Module]:
    """One model, a list or a dict of models, by name.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(value, nn.Module):
        return {role: value}
    models = dict(value) if isinstance(value, Mapping) else None
    if isinstance(value, list | tuple):
        models = {str(i): model for i, model in enumerate(value)}
    if not models or not all(isinstance(m, nn.Module) for m in models.values()):
        raise InputError(f"{role} is a model, or a list or dict of models, found {_kind(value)}")
    return models


def single_model(value: Any, role: str) -> nn.Module:
    """A model.

    Raises:
        InputError: it is none.
    """
    if not isinstance(value, nn.Module):
        raise InputError(f"{role} is one model, found {_kind(value)}")
    return value


def device_of(model: nn.Module) -> torch.device:
    """Where a model's tensors are."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _models(value: Any) -> Iterable[nn.Module]:
    """The models in what stands for a source or target, also inside what wraps one."""
    if isinstance(value, nn.Module):
        return [value]
    if isinstance(value, Mapping | list | tuple):
        return [m for v in (value.values() if isinstance(value, Mapping) else value) for m in _models(v)]
    return _models(value.model) if isinstance(getattr(value, "model", None), nn.Module) else []


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _pixels(image: Tensor) -> dict[str, Any]:
    raw = (image.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
    return {"shape": list(image.shape), "bytes": base64.b64encode(raw.numpy().tobytes()).decode()}

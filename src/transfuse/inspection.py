"""A measure behind the one call: it looks at a source and a target, and the report shows what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfuse.core.files import make_folder
from transfuse.core.machine import commit, machine, versions
from transfuse.measure import Measure, Measurement

if TYPE_CHECKING:
    from transfuse.report.schema import Report

WHY = "A measure says numbers about models as they are; nothing was trained, so nothing could arrive."


@dataclass(frozen=True)
class Inspection:
    """What a measure gives back: the measurement, and the report that shows it."""

    measurement: Measurement
    report: Report

    def save(self, folder: str | Path) -> Path:
        """Write `report.json` and `report.html`; return the folder.

        Raises:
            StoreError: the folder cannot be written to.
        """
        from transfuse.report import write_html

        folder = Path(folder)
        make_folder(folder)
        self.report.write(folder / "report.json")
        write_html(self.report, folder / "report.html")
        return folder


def inspect(
    measure: Measure,
    source: Any,
    target: Any = None,
    data: Any = None,
    *,
    name: str = "measurement",
    seed: int = 0,
    recipe: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
) -> Inspection:
    """Look at models with a measure, and write what it found where `out` says.

    Args:
        measure, source, target, data: as :meth:`transfuse.measure.Measure.measure` takes them.
        name: for the report.
        seed: of random numbers that the measure draws.
        recipe: what to show as the recipe; by default the arguments.

    Raises:
        TransferError: something cannot stand where it stands.
    """
    from transfuse.report.schema import Report

    found = measure.measure(source=source, target=target, data=data, seed=seed)
    first = next(iter(found.numbers), None)
    value = None if first is None else found.as_dict()["numbers"][first]
    numbers = {key: number for key, number in found.as_dict()["numbers"].items() if number is not None}
    run = {"seed": seed, "value": value, "seconds": 0.0, "steps": 0, "metrics": numbers}
    report = Report.model_validate(
        {
            "name": name,
            "created": datetime.now(UTC),
            "task": "measure",
            "metric": first or "nothing",
            "higher_is_better": True,
            "verdict": "not compared",
            "why": WHY,
            "method": repr(measure),
            "arms": [{"name": repr(measure), "role": "method", "runs": [run]}],
            "source": {"name": _named(source)},
            "panels": found.panels(),
            "recipe": dict(recipe or {"measure": repr(measure), "source": _named(source), "target": _named(target)}),
            "versions": versions(),
            "machine": machine(),
            "commit": commit(),
            "warnings": list(found.notes),
        }
    )
    result = Inspection(found, report)
    if out is not None:
        result.save(out)
    return result


def _named(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(map(str, value))
    if isinstance(value, list | tuple):
        return ", ".join(map(_named, value))
    return "nothing" if value is None else type(value).__name__

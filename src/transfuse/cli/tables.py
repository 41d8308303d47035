"""What the command line shows of a dry run, the catalogue and a method. Names are text, never markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from transfuse.core.catalogue import Entry, evidence

if TYPE_CHECKING:
    from collections.abc import Callable

    from transfuse.weights.ledger import Ledger


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table of texts; the last column takes the room that is left."""
    drawn = Table(title=Text(title, "bold"), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        drawn.add_column(Text(heading), overflow="fold", no_wrap=i == 0)  # a name is to be found, and copied
    for row in rows:
        drawn.add_row(*(Text(str(cell)) for cell in row))
    return drawn


def catalogue(entries: Iterable[Entry]) -> Table:
    """One line per method."""
    rows = [(e.name, e.family, e.card.teacher, e.card.data, e.summary) for e in entries]
    return table("Methods", ["name", "family", "teacher", "data", "what it does"], rows)


def card(entry: Entry, line: str) -> Group:
    """Everything about one method."""
    about = entry.card
    rows: list[tuple[str, object]] = [
        ("family", entry.family),
        ("carried by", about.carries),
        ("needs from the source", about.teacher),
        ("needs of the data", about.data),
        ("tasks", ", ".join(about.tasks)),
        ("paper", about.paper + (f", arXiv:{about.arxiv}" if about.arxiv else "")),
        ("in Python", f"from {entry.module.rpartition('.')[0]} import {entry.name}"),
        ("in a recipe", line),
        *(("proof", _proof(proof)) for proof in evidence().get(entry.name, {}).get("proofs", [])),
    ]
    grid = Table.grid(padding=(0, 2))
    for name, value in rows:
        grid.add_row(Text(name, "bold"), Text(str(value), overflow="fold"))
    return Group(Text(entry.name, "bold"), Text(), Text(entry.doc), Text(), grid, Text())


def _proof(proof: Mapping[str, Any]) -> str:
    from transfuse.report.numbers import signed

    if proof["gain"] is None:
        return f"the baseline of {proof['name']}, {proof['seeds']} seeds"
    gain = f"{signed(proof['gain'])} [{signed(proof['low'])}, {signed(proof['high'])}]"
    return f"{proof['verdict']}: {gain} {proof['metric']} over {proof['baseline']}, {proof['seeds']} seeds"


def checked(found: Mapping[str, Any]) -> Group:
    """What a dry run has found."""
    from transfuse.report.numbers import amount, duration

    shown: list[RenderableType] = [
        table("Data", ["stream", "samples", "updates per epoch"], _data(found["data"])),
        table("One batch", ["part", "shape"], [(name, _shape(shape)) for name, shape in found["batch"].items()]),
        table("Models", ["role", "class", "parameters", "gives"], _models(found["models"], amount)),
    ]
    if taps := [(role, *tap) for role, m in found["models"].items() for tap in _taps(m["taps"])]:
        shown.append(table("Taps", ["role", "layer", "shape"], taps))
    arms = [(a, len(found["seeds"])) for a in found["arms"]]
    for name, lesson in reversed(found["lessons"].items()):
        arms = [({**lesson["arms"][0], "name": name, "role": "taught first"}, 1), *arms]
    rows = [
        (
            arm["name"],
            arm["role"],
            f"{seeds} x {_known(arm['updates'])}",
            f"{arm['ms_per_update']:.2f}",
            _known(arm["seconds"] and duration(arm["seconds"] * seeds)),
            amount(arm["side_parameters"]),
        )
        for arm, seeds in arms
    ]
    shown.append(table("Trainings", ["arm", "role", "updates", "ms each", "time", "side parameters"], rows))
    estimate = found["estimate"]
    shown.append(
        Text(
            f"Task {found['task']}, judged by {found['metric'] or 'nothing'}, on {found['device']}. About "
            f"{duration(estimate['seconds'])} of training and {amount(estimate['memory_mb'] * 1e6, 'B')} of memory "
            f"beside the program. Writes to {found['out']}."
        )
    )
    warned = [f"{arm['name']}: {text}" for arm in found["arms"] for text in arm["warnings"]]
    shown += [Text(f"Note: {text}", "yellow") for text in (*found["notes"], *warned)]
    return Group(*shown)


def _data(streams: Mapping[str, Any]) -> list[tuple[object, ...]]:
    return [(name, _known(d["samples"]), _known(d["updates_per_epoch"])) for name, d in streams.items()]


def _models(models: Mapping[str, Any], amount: Callable[[float], str]) -> list[tuple[object, ...]]:
    return [(role, m["class"], amount(m["parameters"]), ", ".join(m["gives"])) for role, m in models.items()]


def _taps(taps: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, _shape(shape)) for name, shape in taps.items()]


def _shape(shape: Any) -> str:
    """`(8, 1, 28, 28)`; several of them where a tap or the inputs hold several."""
    if isinstance(shape, Mapping):
        return ", ".join(f"{name} {_shape(s)}" for name, s in shape.items())
    if isinstance(shape, list):
        return f"({', '.join(map(_shape, shape))})"
    return str(shape)


def _known(value: object) -> str:
    return "unknown" if value is None else str(value)


def ledger(found: Ledger) -> Group:
    """What stood against what in a merge."""
    counts = (
        ("merged", len(found.merged)),
        ("averaged (running statistics)", len(found.averaged)),
        (f"kept from {found.reference}", len(found.kept)),
        ("tied to another", len(found.tied)),
    )
    parts: list[Any] = [table("tensors", ("what is done", "tensors"), [row for row in counts if row[1]])]
    if found.cosines:
        rows = [(f"{cosine:.3f}", pair) for pair, cosine in found.cosines.items()]
        parts.append(table("kinship", ("cosine of weights", "models"), rows))
    if found.distances:
        rows = [(f"{distance:.4f}", name) for name, distance in found.distances.items()]
        parts.append(table("learned since the base", ("change / base", "model"), rows))
    return Group(*parts)

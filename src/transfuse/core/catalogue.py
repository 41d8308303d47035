"""Every method with its card, read from the source without importing torch.

Cards are literals in the class body (`card = Card(...)`), so the catalogue parses the files of the family
folders instead of importing them: `transfuse methods` answers at once, and nothing can go stale.
"""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transfuse.core.card import Card
from transfuse.core.errors import InputError, nearest

FAMILIES = (
    "distill",
    "weights",
    "adapt",
    "cotrain",
    "continual",
    "federated",
    "discover",
    "synthesize",
    "infer",
    "search",
    "measure",
)
WANTS = {
    "smaller": ("distill", "synthesize", "search"),
    "merged": ("weights",),
    "adapted": ("adapt",),
    "several-at-once": ("cotrain",),
    "task-after-task": ("continual",),
    "many-clients": ("federated",),
    "new-classes": ("discover",),
    "made-data": ("synthesize",),
    "at-test-time": ("infer",),
    "architecture": ("search",),
    "numbers": ("measure",),
}
"""What a user may want, in plain words, and the families that serve it."""
ARMS = ("scratch", "finetune", "shuffled teacher", "shuffled source")
"""The arms that every comparison can name, besides methods."""
PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Entry:
    """A method in the catalogue.

    Attributes:
        name: of its class; `summary` is the first line of its docstring, `doc` the rest of it too.
        family: the folder it lives in; `module` is the full module name.
    """

    name: str
    family: str
    module: str
    summary: str
    doc: str
    card: Card

    def as_dict(self) -> dict[str, Any]:
        """For `transfuse methods --json`."""
        return {
            "name": self.name,
            "sheet": self.card.sheet,
            "family": self.family,
            "module": self.module,
            "summary": self.summary,
            **{k: v for k, v in asdict(self.card).items() if k != "sheet"},
            **evidence().get(self.name, {"tests": [], "proofs": []}),
        }

    def load(self) -> Any:
        """The class itself."""
        return getattr(importlib.import_module(self.module), self.name)


@cache
def entries() -> tuple[Entry, ...]:
    """Every method that has a card, by family and name."""
    found = [entry for path in _files() for entry in _read(path)]
    return tuple(sorted(found, key=lambda e: (FAMILIES.index(e.family), e.name.lower())))


@cache
def evidence() -> dict[str, Any]:
    """By method: the files that test it, and what its proofs found. Written by `python -m proofs index`."""
    return json.loads((PACKAGE / "core" / "evidence.json").read_text(encoding="utf-8"))


def find(name: str) -> Entry:
    """The entry of a method, by its class's name, in any case.

    Raises:
        InputError: there is none; the nearest names are given.
    """
    wanted = name.lower().replace("-", "").replace("_", "")
    every = _files()
    for files in ([path for path in every if path.stem.replace("_", "") == wanted], every):  # the likely one first
        for entry in (entry for path in files for entry in _read(path)):
            if entry.name.lower() == wanted:
                return entry
    raise InputError(f"no method is called {name!r}: {nearest(name, (e.name for e in entries()))}")


def select(
    family: str | None = None,
    data: str | None = None,
    teacher: str | None = None,
    task: str | None = None,
    want: str | None = None,
) -> list[Entry]:
    """The methods that fit a situation.

    Args:
        family: one of `FAMILIES`.
        data: what the user has: `"labelled"` data serves methods that need less, `"none"` only those that need none.
        teacher: what the source gives: `"features"` includes full logits, `"data"` is labelled data of another domain,
            `"none"` is no source at all.
        task: what the models do.
        want: what shall come out of it, one of `WANTS`.

    Raises:
        InputError: a word that the catalogue does not know.
    """
    from transfuse.core.card import DATA, TASKS, TEACHERS

    for value, known, what in (
        (family, FAMILIES, "family"),
        (data, DATA, "data"),
        (teacher, TEACHERS, "teacher"),
        (task, TASKS, "task"),
        (want, WANTS, "want"),
    ):
        if value is not None and value not in known:
            raise InputError(f"unknown {what} {value!r}: {nearest(value, known)}")
    return [
        e
        for e in entries()
        if (family is None or e.family == family)
        and (data is None or e.card.data in SERVES_DATA[data])
        and (teacher is None or not set(e.card.sources).isdisjoint(SERVES_TEACHER[teacher]))
        and (task is None or task in e.card.tasks)
        and (want is None or e.family in WANTS[want])
    ]


SERVES_DATA = {
    "labelled": ("labelled", "few-labelled", "unlabelled", "none"),
    "few-labelled": ("few-labelled", "unlabelled", "none"),
    "unlabelled": ("unlabelled", "none"),
    "private": ("private",),
    "none": ("none",),
}
SERVES_TEACHER = {
    "features": ("features", "full", "none"),
    "full": ("full", "none"),
    "topk": ("topk", "none"),
    "sampled": ("sampled", "none"),
    "text": ("text", "none"),
    "weights": ("weights", "none"),
    "data": ("data", "none"),
    "tasks": ("tasks", "none"),
    "clients": ("clients", "none"),
    "none": ("none",),
}


def working_with(gives: Iterable[str]) -> list[str]:
    """The names of the methods that a source with these capabilities can serve."""
    gives = set(gives)
    return [e.name for e in entries() if not e.card.control and e.family != "measure" and gives & set(e.card.sources)]


def _files() -> list[Path]:
    return [path for family in FAMILIES for path in sorted((PACKAGE / family).glob("*.py"))]


@cache
def _read(path: Path) -> list[Entry]:
    found = []
    for text in path.read_text(encoding="utf-8").split("\nclass ")[1:]:
        head, starts, rest = text.partition("\n    card = Card(")
        if not starts:
            continue
        # Parsing takes time, so a class is read up to the end of its card: the first line that is not indented further.
        card = starts + (rest.partition("\n    )")[0] + "\n    )" if rest.startswith("\n") else rest.partition("\n")[0])
        node = ast.parse(f"class {head}{card}").body[0]
        assert isinstance(node, ast.ClassDef)
        doc = ast.get_docstring(node) or ""
        module = f"transfuse.{path.parent.name}.{path.stem}"
        found.append(Entry(node.name, path.parent.name, module, doc.partition("\n")[0], doc, _card(node)))
    return found


def _card(node: ast.ClassDef) -> Card:
    assignment: Any = node.body[-1]
    return Card(**{k.arg: ast.literal_eval(k.value) for k in assignment.value.keywords if k.arg})

"""Call something by the name that a recipe gives it, with errors that say which names there are.

Models and data sets are looked up here. Methods are not: they carry cards and live in the catalogue.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from transfuse.core.errors import InputError, nearest

T = TypeVar("T")


def call_named(kind: str, registry: Mapping[str, Callable[..., T]], name: str, arguments: Mapping[str, Any]) -> T:
    """Return `registry[name](**arguments)`.

    Args:
        kind: what the registry holds, for messages: `"model"`, `"data set"`.

    Raises:
        InputError: no entry has that name, or the entry does not take one of the arguments or lacks one.
    """
    if name not in registry:
        raise InputError(f"there is no {kind} {name!r}; {nearest(name, registry)}")
    entry = registry[name]
    parameters = inspect.signature(entry).parameters
    accepted = ", ".join(str(p.replace(annotation=p.empty)) for p in parameters.values()) or "no arguments"
    kinds = {p.kind for p in parameters.values()}
    unknown = [a for a in arguments if a not in parameters]
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise InputError(f"{kind} {name!r} has no argument {unknown[0]!r}; it takes: {accepted}")
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    missing = [n for n, p in named.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise InputError(f"{kind} {name!r} needs the argument {missing[0]!r}; it takes: {accepted}")
    return entry(**arguments)

"""From a YAML file to a plain dict, and from pydantic's errors to plain words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import ErrorDetails

from transfuse.core.errors import InputError, nearest


class Loader(yaml.SafeLoader):
    """YAML as people expect it: `1e-3` is a number, a date is text, and a key that stands twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's name and kind
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        others = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise InputError(f"there is no recipe {path}; in {path.parent}, {nearest(path.name, others)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the recipe {path}: {error}") from None


def parse(text: str, path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(text, Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{path}{where}: {error.problem or error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no recipe: expected `key: value` lines; `transfuse new` writes an example")
    return content


EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "list": "a list, for instance [1, 2]",
    "tuple": "a list of two numbers",
    "dict": "`key: value` pairs",
    "model": "`key: value` pairs",
}
"""What pydantic's error types, up to their first underscore, ask for."""


def explain(details: ErrorDetails) -> str:
    """One problem in plain words: the place, what was expected, what was found."""
    place = "".join(
        f"[{step}]" if isinstance(step, int) else f".{step}" for step in details["loc"] if not str(step).startswith("<")
    ).removeprefix(".")
    context, kind = details.get("ctx", {}), details["type"]
    if kind == "unknown_key":
        return f"{place}.{context['key']}".removeprefix(".") + f": {details['msg']}"
    if kind == "missing":
        return f"{place}: is missing"
    if kind == "value_error":
        return f"{place}: {context['error']}" if place else str(context["error"])
    expected = EXPECTED.get(kind.partition("_")[0])
    found = repr(details["input"])
    shown = found if len(found) <= 60 else found[:57] + "..."
    return f"{place}: expected {expected}, found {shown}" if expected else f"{place}: {details['msg']}, found {shown}"

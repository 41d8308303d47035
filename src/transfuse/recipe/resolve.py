"""What the names in a recipe stand for: functions of the user's own, Hugging Face folders, arguments of methods."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from transfuse.core import catalogue
from transfuse.core.errors import InputError, MissingExtraError, nearest
from transfuse.core.registry import call_named

if TYPE_CHECKING:
    from torch import nn


def call(
    folder: Path, kind: str, registry: Mapping[str, Callable[..., Any]], name: str, args: Mapping[str, Any]
) -> Any:
    """Call what a name stands for: an entry of the registry, or a function of the user's own.

    Args:
        folder: what paths are relative to, `file.py:function` and arguments that are declared as paths.
        kind: what the registry holds, for messages.

    Raises:
        InputError: there is nothing of that name, or it does not take these arguments.
    """
    if ":" in name:
        registry = {name: function(folder, name)}
    if name in registry:
        parameters = inspect.signature(registry[name]).parameters
        args = {
            key: located(folder, value) if "Path" in str(getattr(parameters.get(key), "annotation", "")) else value
            for key, value in args.items()
        }
    return call_named(kind, registry, name, args)


def located(folder: Path, value: Any) -> Any:
    """A path, or a list of them, relative to the recipe."""
    if isinstance(value, list):
        return [located(folder, v) for v in value]
    return str(folder / value) if isinstance(value, str) else value


def function(folder: Path, reference: str) -> Callable[..., Any]:
    """`file.py:function` or `package.module:function`; modules beside the recipe are found, too."""
    where, _, name = reference.rpartition(":")
    beside = str(folder.resolve())
    if beside not in sys.path:
        sys.path.append(beside)
    if where.endswith(".py"):
        module = imported(folder / where)
    else:
        try:
            module = importlib.import_module(where)
        except ImportError as error:
            raise InputError(f"cannot import {where!r}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise InputError(f"{where} has no function {name!r}; {nearest(name, known)}")
    return found


def imported(file: Path) -> ModuleType:
    """A file as a module, under its path as its name, so that it hides no other module; run once."""
    name = str(file.resolve())
    if name in sys.modules:
        return sys.modules[name]
    if not file.is_file():
        raise InputError(f"there is no file {file}")
    origin = importlib.util.spec_from_file_location(name, file)
    assert origin is not None
    assert origin.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(origin)
    try:
        origin.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def hugging_face(folder: Path, auto: str | None, args: Mapping[str, Any]) -> nn.Module:
    """A model from a local Hugging Face folder; nothing is downloaded and no code of the folder is run.

    Args:
        auto: the class of transformers that reads it; by default the one that its configuration names.
        args: of `from_pretrained`, for instance `num_labels`.

    Raises:
        InputError: the folder holds no model, or there is no such class.
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "a Hugging Face model") from error
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no folder with a Hugging Face model: it has no config.json")
    if auto is None:
        architectures = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).architectures
        auto = next(iter(architectures or ()), "AutoModel")
    reader = getattr(transformers, auto, None)
    if reader is None:
        known = [name for name in dir(transformers) if name.startswith("AutoModel")]
        raise InputError(f"transformers has no {auto!r}; {nearest(auto, known)}")
    try:
        return reader.from_pretrained(folder, local_files_only=True, **args)
    except OSError as error:
        raise InputError(f"cannot read the model in {folder}: {error}") from error


def accepts(name: str) -> dict[str, Any]:
    """The arguments of a method and their defaults (`inspect.Parameter.empty` where there is none)."""
    from transfuse.core.method import Method

    factory = catalogue.find(name).load()
    if factory.__init__ is Method.__init__:
        return {}
    return {key: parameter.default for key, parameter in inspect.signature(factory).parameters.items()}

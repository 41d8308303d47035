"""Recipes: a transfer as a YAML file, checked key by key before torch is imported or anything is loaded.

    result = Recipe.read("recipes/quickstart.yaml").run()

The shape of the file is :class:`Content`. Paths in a recipe (weights, `file.py:function`, arguments that a loader
declares as paths) are relative to the recipe; `out` is relative to where you are.
Lives here: reading, checking and building. Training and measuring: :class:`~transfuse.experiment.Transfer`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import operator
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from transfuse.core import catalogue
from transfuse.core.errors import InputError, MethodError, MissingExtraError, StoreError, nearest
from transfuse.core.files import write_atomically
from transfuse.core.interruption import Interrupted
from transfuse.core.registry import call_named

if TYPE_CHECKING:
    from torch import nn

    from transfuse.core.clock import Schedule
    from transfuse.core.method import Method
    from transfuse.experiment import Listener, Result, Transfer

ARMS = ("scratch", "finetune", "shuffled teacher")
"""The arms that `compare` can name; the same as in :mod:`transfuse.experiment`, which imports torch."""


# The shape of the file --------------------------------------------------------------------------------------------


class Part(BaseModel):
    """What all parts of a recipe share: an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)
    short: ClassVar[str | None] = None
    """The key that a plain text stands for: `data: digits` is `data: {name: digits}`."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, content: Any) -> Any:
        if isinstance(content, str) and cls.short:
            return {cls.short: content}
        if isinstance(content, Mapping) and cls.model_config["extra"] == "forbid":
            for key in map(str, content):
                if key not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_key", "unknown key; {hint}", {"key": key, "hint": _hint(key, cls)}
                    )
        return content

    def _exactly_one(self, a: str, b: str) -> Self:
        if (getattr(self, a) is None) == (getattr(self, b) is None):
            raise InputError(f"expected {a!r} or {b!r}, one of them")
        return self


class Ramp(Part):
    """A weight that follows the training from start to end: `{linear: [0, 1]}` or `{cosine: [1, 0]}`."""

    linear: tuple[float, float] | None = None
    cosine: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        return self._exactly_one("linear", "cosine")

    def schedule(self) -> Schedule:
        """As a function of the clock."""
        from transfuse.core.clock import Cosine, Linear

        return Linear(*self.linear) if self.linear else Cosine(*(self.cosine or ()))


class One(Part):
    """One method: its name, its weight among others, and its arguments."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)
    short = "name"

    name: str
    weight: Annotated[
        Annotated[float, Tag("<number>")] | Annotated[Ramp, Tag("<ramp>")],
        Discriminator(lambda value: "<number>" if isinstance(value, int | float | str) else "<ramp>"),
    ] = 1.0

    @field_validator("name")
    @classmethod
    def _in_catalogue(cls, name: str) -> str:
        return catalogue.find(name).name


class Chain(Part):
    """Methods one after the other: `{then: [Hints, KD], shares: [0.3, 0.7]}`."""

    then: list[MethodSpec] = Field(min_length=1)
    shares: list[float] | None = None


def _form(value: Any) -> str:
    """Which form of a method a value has."""
    if isinstance(value, list):
        return "<sum>"
    return "<chain>" if isinstance(value, Chain) or (isinstance(value, Mapping) and "then" in value) else "<one>"


def _arm_or_form(value: Any) -> str:
    return "<arm>" if _is_arm(value) else _form(value)


def _is_arm(value: Any) -> bool:
    return isinstance(value, str) and value.replace("_", " ").replace("-", " ").lower() in ARMS


MethodSpec = Annotated[
    Annotated[One, Tag("<one>")]
    | Annotated[list[One], Field(min_length=1), Tag("<sum>")]
    | Annotated[Chain, Tag("<chain>")],
    Discriminator(_form),
]
ArmSpec = Annotated[
    Annotated[str, Tag("<arm>")]
    | Annotated[One, Tag("<one>")]
    | Annotated[list[One], Field(min_length=1), Tag("<sum>")]
    | Annotated[Chain, Tag("<chain>")],
    Discriminator(_arm_or_form),
]


class DataSpec(Part):
    """A data set by its name, or `file.py:function` or `package.module:function`, and its arguments."""

    short = "name"

    name: str
    args: dict[str, JsonValue] = {}


class ModelSpec(Part):
    """A model by its name or its function, or a local Hugging Face folder; then perhaps weights to load."""

    short = "model"

    model: str | None = None
    huggingface: str | None = None
    auto: str | None = None
    args: dict[str, JsonValue] = {}
    weights: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.auto is not None and self.huggingface is None:
            raise InputError("'auto' is the class that reads a 'huggingface' folder, and none is given")
        return self._exactly_one("model", "huggingface")

    @property
    def pretrained(self) -> bool:
        """Whether its weights come from a file, so that they are the same for every seed."""
        return self.huggingface is not None or self.weights is not None


class TrainingSpec(Part):
    """:class:`transfuse.core.training.Training` without the seed, for a reader that has not imported torch."""

    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 64
    micro_batch: int | None = None
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup: int = 0
    clip: float | None = None
    ema: float | None = None
    precision: str = "fp32"
    shuffle: bool = True
    workers: int = 0
    validate_every: int | None = None
    checkpoint_every: float = 60.0


class SourceTrainingSpec(TrainingSpec):
    """How the source is trained on labels before it teaches; on the recipe's data by default."""

    data: DataSpec | None = None


class SourceSpec(ModelSpec):
    """The model that knows."""

    train: SourceTrainingSpec | None = None


class Content(Part):
    """A whole recipe."""

    name: str | None = None
    method: MethodSpec
    source: SourceSpec | None = None
    target: ModelSpec
    data: DataSpec
    training: TrainingSpec
    compare: list[ArmSpec] = []
    seeds: list[int] = Field([0], min_length=1)
    device: str | None = None
    task: str | None = None
    out: str | None = None

    @field_validator("compare", mode="before")
    @classmethod
    def _known_arms(cls, entries: Any) -> Any:
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, str) and not _is_arm(entry):
                try:
                    catalogue.find(entry)
                except InputError:
                    known = [*ARMS, *(found.name for found in catalogue.entries())]
                    raise InputError(f"no arm or method is called {entry!r}: {nearest(entry, known)}") from None
        return entries


# The recipe -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Nothing is imported or loaded before :meth:`build`, :meth:`check` or :meth:`run`.

    Attributes:
        path: the file, for messages.
        folder: what paths in the recipe are relative to.
        text: the file as it was given.
        content: what it says, as in the report.
        spec: the same, checked and with defaults.
        out: where the run goes.
    """

    path: Path
    folder: Path
    text: str
    content: dict[str, Any]
    spec: Content
    out: Path

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        out: str | Path | None = None,
        seeds: list[int] | None = None,
        folder: str | Path | None = None,
    ) -> Self:
        """Read and check a recipe.

        Args:
            path: the YAML file.
            out, seeds: take the place of the recipe's.
            folder: what paths in it are relative to; by default the folder it lies in.

        Raises:
            InputError: there is no such file, it is not YAML, or a key or value in it is wrong; the message says
                which, where, and what was expected.
        """
        path = Path(path)
        text = _read_text(path)
        content = _parse(text, path)
        if seeds:
            content["seeds"] = list(seeds)
        try:
            spec = Content.model_validate(content)
        except ValidationError as error:
            problems = [_explain(details) for details in error.errors()]
            raise InputError(f"{path}: " + f"\n{path}: ".join(problems)) from None
        name = spec.name or path.stem
        return cls(
            path,
            Path(folder) if folder else path.parent,
            text,
            content,
            spec.model_copy(update={"name": name}),
            Path(out or spec.out or Path("runs") / name),
        )

    @classmethod
    def of_run(cls, out: str | Path) -> Self:
        """The recipe of a run that was started in a folder.

        Raises:
            InputError: no recipe was started there.
            StoreError: what was noted at its start cannot be read.
        """
        out = Path(out)
        if not (out / RECIPE).exists():
            how = (
                "it was started from Python: call run(resume=True) on the same transfer"
                if (out / "transfer.json").exists()
                else "it is not the folder of a run"
            )
            raise InputError(f"{out} holds no {RECIPE}, so there is nothing to resume: {how}")
        try:
            started = json.loads((out / STARTED).read_text(encoding="utf-8"))
            recipe = cls.read(out / RECIPE, out=out, seeds=started["seeds"], folder=out / started["folder"])
            return replace(recipe, spec=recipe.spec.model_copy(update={"name": started["name"]}))
        except (OSError, json.JSONDecodeError, KeyError) as error:
            raise StoreError(f"cannot read {out / STARTED}, which says how this run was started: {error}") from None

    @property
    def trainings(self) -> int:
        """How many models are trained: every arm with every seed, and the source where the recipe asks for it."""
        return (1 + len(self.spec.compare)) * len(self.spec.seeds) + (self._source_training is not None)

    @property
    def finished(self) -> int:
        """How many of them an earlier, interrupted run has finished."""
        return sum(1 for part in ("", SOURCE) for _ in (self.out / part).glob("arms/*/seed-*/run.safetensors"))

    def build(self, listener: Listener | None = None) -> Transfer:
        """The transfer, ready to run; its source is trained first where the recipe asks for it, in `out`.

        Args:
            listener: called after every update, see :data:`~transfuse.experiment.Listener`.

        Raises:
            TransferError: as :class:`~transfuse.experiment.Transfer`.
        """
        transfer, lesson = self._assemble(listener)
        self._teach(transfer, lesson)
        return transfer

    def check(self) -> dict[str, Any]:
        """A dry run: :meth:`~transfuse.experiment.Transfer.check`, of the source's training too; nothing is written.

        Raises:
            TransferError: what is wrong, as when it is run.
        """
        transfer, lesson = self._assemble()
        found = {"name": self.spec.name, **transfer.check(), "out": str(self.out), "notes": []}
        if lesson is not None:
            found["source_training"] = lesson.check()
            found["estimate"]["seconds"] += found["source_training"]["estimate"]["seconds"]
        if (self.out / RECIPE).exists():
            found["notes"].append(f"{self.out} holds a run already: resume it, or choose another folder.")
        return found

    def run(self, resume: bool = False, listener: Listener | None = None) -> Result:
        """Check, train every arm with every seed, judge, and write everything into `out`.

        Args:
            resume: go on with what `out` holds; start where it holds nothing.
            listener: as for :meth:`build`.

        Raises:
            TransferError: what is wrong; before anything is trained or written wherever it can be known then.
            Interrupted: the user stopped it; what was done is kept.
        """
        begun = self._begun(resume)
        transfer, lesson = self._assemble(listener)
        # A stream that can be read only once is not to be read by a dry run.
        if not begun and not any(getattr(data, "once", False) for data in transfer.data.values()):
            transfer.check()
        transfer.sync.barrier()
        if not begun and transfer.sync.rank == 0:
            self._note_start()
        transfer.sync.barrier()
        try:
            self._teach(transfer, lesson)
            return transfer.run(resume)
        except KeyboardInterrupt as stop:
            raise Interrupted(f"stopped; what was done is kept. Go on with: transfuse resume {self.out}") from stop

    # The folder ----------------------------------------------------------------------------------------------------

    def _begun(self, resume: bool) -> bool:
        """Whether this recipe was started in `out` before; whatever else lies there is refused."""
        if not any((self.out / name).exists() for name in (RECIPE, "transfer.json")):
            return False
        if not resume:
            raise InputError(
                f"{self.out} holds a run already. Go on with it (transfuse resume {self.out}), or choose another "
                "folder (--out)"
            )
        if Recipe.of_run(self.out).content != self.content:
            raise InputError(f"{self.out} holds a run of another recipe, {self.out / RECIPE}: choose another folder")
        return True

    def _note_start(self) -> None:
        """Write what :meth:`of_run` reads; the recipe last, since it claims the folder."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot create {self.out}: {error.strerror or error}") from None
        started = {
            "name": self.spec.name,
            "folder": os.path.relpath(self.folder, self.out),
            "seeds": self.content.get("seeds"),
        }
        write_atomically(self.out / STARTED, json.dumps(started))
        write_atomically(self.out / RECIPE, self.text)

    # Building ------------------------------------------------------------------------------------------------------

    @property
    def _source_training(self) -> SourceTrainingSpec | None:
        return self.spec.source.train if self.spec.source else None

    def _assemble(self, listener: Listener | None = None) -> tuple[Transfer, Transfer | None]:
        """The transfer, and the one that trains its source (or None); what is cheap and often wrong comes first."""
        from transfuse.core.training import Training
        from transfuse.experiment import Transfer

        spec, training = self.spec, self.spec.training.model_dump(exclude_unset=True)
        with self._at("training"):
            Training(**training)
        with self._at("method"):
            method = self._method(spec.method)
        with self._at("compare"):
            compare = [entry if isinstance(entry, str) else self._method(entry) for entry in spec.compare]
        source, target = self._source(), self._target()
        with self._at("data"):
            data = self._data(spec.data)
        lesson = self._lesson(source, data, listener)
        with self._at():
            transfer = Transfer(
                method,
                source,
                target,
                **{**data, "task": spec.task or data.get("task")},
                compare=compare,
                seeds=spec.seeds,
                out=self.out,
                device=spec.device,
                name=str(spec.name),
                recipe=self.content,
                listener=listener,
                **training,
            )
        return transfer, lesson

    def _lesson(self, source: Any, data: dict[str, Any], listener: Listener | None) -> Transfer | None:
        """The training of the source on labels."""
        from torch import nn

        from transfuse.distill import Labels
        from transfuse.experiment import Transfer

        spec = self._source_training
        if spec is None:
            return None
        with self._at("source.train"):
            if not isinstance(source, nn.Module):
                raise InputError(f"a {type(source).__name__} cannot be trained: expected a torch.nn.Module")
            data = data if spec.data is None else self._data(spec.data)
            return Transfer(
                Labels(),
                target=source,
                **{**data, "task": self.spec.task or data.get("task")},
                out=self.out / SOURCE,
                device=self.spec.device,
                name=f"{self.spec.name}: the source",
                recipe=self.content,
                listener=listener and (lambda _, *update: listener("source", *update)),
                **spec.model_dump(exclude_unset=True, exclude={"data"}),
            )

    def _teach(self, transfer: Transfer, lesson: Transfer | None) -> None:
        """Train the source, or read what was trained before, into the transfer."""
        from transfuse.core.checkpoint import load_weights

        if lesson is None:
            return
        assert transfer.source is not None
        weights = self.out / SOURCE / "model.safetensors"
        if not weights.exists():
            lesson.run(resume=True)
        load_weights(weights, transfer.source)

    def _method(self, spec: One | list[One] | Chain) -> Method:
        from transfuse.core.composition import Then
        from transfuse.core.method import Method

        if isinstance(spec, Chain):
            return Then(*map(self._method, spec.then), shares=spec.shares)
        if isinstance(spec, list):
            return reduce(operator.add, map(self._method, spec))
        factory = catalogue.find(spec.name).load()
        # A class without an __init__ of its own takes no arguments, whatever torch's __init__ looks like.
        takes = factory if factory.__init__ is not Method.__init__ else (lambda: factory())
        method: Method = call_named("method", {spec.name: takes}, spec.name, spec.__pydantic_extra__)
        if spec.weight == 1.0:
            return method
        return method.weighted(spec.weight.schedule() if isinstance(spec.weight, Ramp) else spec.weight)

    def _source(self) -> Any:
        from transfuse.core import rng

        if self.spec.source is None:
            return None
        with self._at("source"), rng.scope(rng.derive("source")):
            return self._model(self.spec.source)

    def _target(self) -> nn.Module | Callable[[], nn.Module]:
        """A model where its weights are given, else a function, so that every seed has its own."""

        def build() -> nn.Module:
            with self._at("target"):
                return self._model(self.spec.target)

        return build() if self.spec.target.pretrained else build

    def _model(self, spec: ModelSpec) -> Any:
        from transfuse.core.checkpoint import load_weights
        from transfuse.models import MODELS

        if spec.huggingface is not None:
            model = hugging_face(self.folder / spec.huggingface, spec.auto, spec.args)
        else:
            model = self._call("model", MODELS, str(spec.model), spec.args)
        if spec.weights is not None:
            load_weights(self.folder / spec.weights, model)
        return model

    def _data(self, spec: DataSpec) -> dict[str, Any]:
        """What a loader returns, as arguments of a transfer."""
        from transfuse.datasets import DATASETS, Splits

        found = self._call("data set", DATASETS, spec.name, spec.args)
        if isinstance(found, Splits):
            found = {key: getattr(found, key) for key in ("train", "validate", "test", "classes", "task")}
        elif isinstance(found, tuple) and len(found) == 3:
            found = dict(zip(("train", "validate", "test"), found, strict=True))
        if not isinstance(found, Mapping) or "train" not in found:
            raise InputError(
                f"{spec.name} returned a {type(found).__name__}: expected transfuse.datasets.Splits, a tuple (train, "
                "validate, test), or a dict with 'train' and perhaps 'validate', 'test', 'classes', 'task'"
            )
        keys = {"train": "data", "validation": "validate", **{k: k for k in ("validate", "test", "classes", "task")}}
        for key in found:
            if key not in keys:
                raise InputError(f"{spec.name} returned {key!r}, which is unknown; {nearest(key, keys)}")
        return {keys[key]: value for key, value in found.items()}

    def _call(self, kind: str, registry: Mapping[str, Callable[..., Any]], name: str, args: dict[str, Any]) -> Any:
        """Call what a name stands for: an entry of the registry, or a function of the user's own."""
        if ":" in name:
            registry = {name: self._function(name)}
        if name in registry:
            parameters = inspect.signature(registry[name]).parameters
            args = {
                key: self._located(value) if "Path" in str(getattr(parameters.get(key), "annotation", "")) else value
                for key, value in args.items()
            }
        return call_named(kind, registry, name, args)

    def _located(self, value: Any) -> Any:
        """A path, or a list of them, relative to the recipe."""
        if isinstance(value, list):
            return [self._located(v) for v in value]
        return str(self.folder / value) if isinstance(value, str) else value

    def _function(self, reference: str) -> Callable[..., Any]:
        """`file.py:function` or `package.module:function`; modules beside the recipe are found, too."""
        where, _, name = reference.rpartition(":")
        beside = str(self.folder.resolve())
        if beside not in sys.path:
            sys.path.append(beside)
        if where.endswith(".py"):
            module = _imported(self.folder / where)
        else:
            try:
                module = importlib.import_module(where)
            except ImportError as error:
                raise InputError(f"cannot import {where!r}: {error}") from error
        function = getattr(module, name, None)
        if not callable(function):
            known = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
            raise InputError(f"{where} has no function {name!r}; {nearest(name, known)}")
        return function

    @contextmanager
    def _at(self, place: str = "") -> Iterator[None]:
        """Say in which file, and at which place of it, the cause of an error stands."""
        where = f"{self.path}: {place}: " if place else f"{self.path}: "
        try:
            yield
        except (InputError, MethodError) as error:
            raise type(error)(f"{where}{error}") from error
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}{type(error).__name__}: {error}") from error


RECIPE, STARTED, SOURCE = "recipe.yaml", "started.json", "source"
"""Names in the folder of a run: the recipe as given, how it was started, the training of the source."""


def accepts(name: str) -> dict[str, Any]:
    """The arguments of a method and their defaults (`inspect.Parameter.empty` where there is none)."""
    from transfuse.core.method import Method

    factory = catalogue.find(name).load()
    if factory.__init__ is Method.__init__:
        return {}
    return {key: parameter.default for key, parameter in inspect.signature(factory).parameters.items()}


def _imported(file: Path) -> ModuleType:
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


# Reading ----------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
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


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        others = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise InputError(f"there is no recipe {path}; in {path.parent}, {nearest(path.name, others)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the recipe {path}: {error}") from None


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(text, _Loader)  # a SafeLoader
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


def _explain(details: ErrorDetails) -> str:
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
        return f"{place}: {context['error']}"
    expected = EXPECTED.get(kind.partition("_")[0])
    found = repr(details["input"])
    shown = found if len(found) <= 60 else found[:57] + "..."
    return f"{place}: expected {expected}, found {shown}" if expected else f"{place}: {details['msg']}, found {shown}"


def _hint(key: str, part: type[Part]) -> str:
    """Where an unknown key belongs, or which known one is meant."""
    homes: dict[str, type[Part]] = {
        "under 'training'": TrainingSpec,
        "under 'source'": SourceSpec,
        "at the top of the recipe": Content,
    }
    for home, other in homes.items():
        if key in other.model_fields and not issubclass(part, other):
            return f"it belongs {home}."
    return nearest(key, part.model_fields)

"""Reading, checking, building and running a recipe."""

from __future__ import annotations

import json
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import ValidationError

from transfuse.core import catalogue
from transfuse.core.errors import InputError, MethodError, StoreError, nearest
from transfuse.core.files import make_folder, write_atomically
from transfuse.core.interruption import Interrupted
from transfuse.core.registry import call_named
from transfuse.recipe.reading import explain, parse, read_text
from transfuse.recipe.resolve import accepts, call, hugging_face
from transfuse.recipe.schema import Chain, Content, DataSpec, LessonSpec, ModelSpec, One, Ramp, SourceSpec

if TYPE_CHECKING:
    from torch import nn

    from transfuse.core.method import Method
    from transfuse.experiment import Listener, Result, Transfer
    from transfuse.inspection import Inspection
    from transfuse.measure import Measure

RECIPE, STARTED = "recipe.yaml", "started.json"
"""Names in the folder of a run: the recipe as given, and how it was started."""
OTHERS = ("validate", "test", "classes", "task", "source")
"""What a loader may return besides `train`."""


@dataclass(frozen=True)
class Lesson:
    """A model that is trained on labels before the transfer begins.

    Attributes:
        name: `"source"`, `"source.0"`, ..., `"target"`; also the folder, in that of the run.
        transfer: the training.
        model: what is taught.
    """

    name: str
    transfer: Transfer
    model: nn.Module


@dataclass(frozen=True)
class Ends:
    """What a recipe's method stands between.

    Attributes:
        source, target: as a transfer takes them.
        data: its data, held-out data and what is known of them, as arguments of a transfer.
        brought: labelled data of another domain that came with the data.
        lessons: what is taught first.
    """

    source: Any
    target: Any
    data: dict[str, Any]
    brought: Any
    lessons: list[Lesson]


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
        text = read_text(path)
        content = parse(text, path)
        if seeds:
            content["seeds"] = list(seeds)
        try:
            spec = Content.model_validate(content)
        except ValidationError as error:
            problems = [explain(details) for details in error.errors()]
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
        """How many models are trained: every arm with every seed, and what is taught on labels first."""
        return (1 + len(self.spec.compare)) * len(self.spec.seeds) + len(self._lessons)

    @property
    def finished(self) -> int:
        """How many of them an earlier, interrupted run has finished."""
        folders = ("", *self._lessons)
        return sum(1 for part in folders for _ in (self.out / part).glob("arms/*/seed-*/run.safetensors"))

    def build(self, listener: Listener | None = None) -> Transfer:
        """The transfer, ready to run; models are trained on labels first where the recipe asks for it, in `out`.

        Args:
            listener: called after every update, see :data:`~transfuse.experiment.Listener`.

        Raises:
            TransferError: as :class:`~transfuse.experiment.Transfer`.
        """
        transfer, lessons = self._assemble(listener)
        self._teach(lessons)
        return transfer

    def student(self) -> nn.Module:
        """The model that a finished run in `out` has written.

        Raises:
            InputError: the run has not finished, or deploys more than its target's own weights.
        """
        from transfuse.core.checkpoint import load_weights

        weights = self.out / "model.safetensors"
        if not weights.exists():
            raise InputError(f"{self.out} holds no model.safetensors: finish its run with transfuse resume {self.out}")
        with self._at("target"):
            model: nn.Module = self._model(self.spec.target)
        load_weights(weights, model)
        return model.eval()

    def check(self) -> dict[str, Any]:
        """A dry run: :meth:`~transfuse.experiment.Transfer.check`, of the lessons too; nothing is written.

        Raises:
            TransferError: what is wrong, as when it is run.
        """
        if self.spec.measures:
            measure, lessons = self._measure(), self._ends(None).lessons
            return {
                "name": self.spec.name,
                "measure": repr(measure),
                "lessons": [lesson.name for lesson in lessons],
            }
        transfer, lessons = self._assemble()
        found = {"name": self.spec.name, **transfer.check(), "out": str(self.out), "notes": [], "lessons": {}}
        for lesson in lessons:
            found["lessons"][lesson.name] = checked = lesson.transfer.check()
            found["estimate"]["seconds"] += checked["estimate"]["seconds"]
        if (self.out / RECIPE).exists():
            found["notes"].append(f"{self.out} holds a run already: resume it, or choose another folder.")
        return found

    def run(self, resume: bool = False, listener: Listener | None = None) -> Result | Inspection:
        """Check, train every arm with every seed, judge, and write everything into `out`.

        Args:
            resume: go on with what `out` holds; start where it holds nothing.
            listener: as for :meth:`build`.

        Raises:
            TransferError: what is wrong; before anything is trained or written wherever it can be known then.
            Interrupted: the user stopped it; what was done is kept.
        """
        begun = self._begun(resume)
        if self.spec.measures:
            return self._inspect(listener)
        transfer, lessons = self._assemble(listener)
        # A stream that can be read only once is not to be read by a dry run.
        if not begun and not any(getattr(data, "once", False) for data in transfer.data.values()):
            transfer.check()
        transfer.sync.barrier()
        if not begun and transfer.sync.rank == 0:
            self._note_start()
        transfer.sync.barrier()
        try:
            self._teach(lessons)
            self._keep(transfer, shown=listener is not None)
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
        make_folder(self.out)
        started = {
            "name": self.spec.name,
            "folder": os.path.relpath(self.folder, self.out),
            "seeds": self.content.get("seeds"),
        }
        write_atomically(self.out / STARTED, json.dumps(started))
        write_atomically(self.out / RECIPE, self.text)

    # Building ------------------------------------------------------------------------------------------------------

    @property
    def _sources(self) -> dict[str, SourceSpec]:
        """The source, or several, by name."""
        given = self.spec.source
        if isinstance(given, list):
            return {f"source.{i}": spec for i, spec in enumerate(given)}
        return {} if given is None else {"source": given}

    @property
    def _lessons(self) -> dict[str, LessonSpec]:
        """What is taught on labels first, by name."""
        taught = {**self._sources, "target": self.spec.target}
        return {name: spec.train for name, spec in taught.items() if spec.train is not None}

    def _assemble(self, listener: Listener | None = None) -> tuple[Transfer, list[Lesson]]:
        """The transfer, and the lessons before it; what is cheap and often wrong comes first."""
        from transfuse.core.training import Training
        from transfuse.experiment import Transfer

        spec, training = self.spec, self.spec.training.model_dump(exclude_unset=True)
        if spec.trains:
            with self._at("training"):
                Training(**training)
        with self._at("method"):
            method = self._method(spec.method)
        with self._at("compare"):
            compare = [entry if isinstance(entry, str) else self._method(entry) for entry in spec.compare]
        ends = self._ends(listener)
        source, data = ends.source, ends.data
        if source is None and any(part.card.teacher == "data" for part in method.parts):
            source = ends.brought
        with self._at():
            transfer = Transfer(
                method,
                source,
                ends.target,
                **{**data, "task": spec.task or data.get("task")},
                compare=compare,
                seeds=spec.seeds,
                select=spec.select,
                out=self.out,
                device=spec.device,
                name=str(spec.name),
                recipe=self.content,
                listener=listener,
                track=spec.track,
                **training,
            )
        return transfer, ends.lessons

    def _ends(self, listener: Listener | None) -> Ends:
        """Everything but the method: models, data, and what is taught first."""
        sources = {name: self._source(name, given) for name, given in self._sources.items()}
        target = self._target()
        data = self._data("data", self.spec.data)
        brought = data.pop("source", None)
        source: Any = list(sources.values()) if isinstance(self.spec.source, list) else sources.get("source")
        lessons = [
            self._lesson(name, {**sources, "target": target}[name], {**data, "source": brought}, listener)
            for name in self._lessons
        ]
        return Ends(source, target, data, brought, lessons)

    def _measure(self) -> Measure:
        """The measure that stands in the place of a method."""
        assert isinstance(self.spec.method, One)
        factory = catalogue.find(self.spec.method.name).load()
        with self._at("method"):
            measure: Measure = call_named(
                "measure", {self.spec.method.name: factory}, self.spec.method.name, self.spec.method.__pydantic_extra__
            )
        return measure

    def _inspect(self, listener: Listener | None) -> Inspection:
        """Teach what is to be taught first, then look at the models."""
        from transfuse.inspection import inspect

        measure, ends = self._measure(), self._ends(listener)
        if not (self.out / RECIPE).exists():
            self._note_start()
        self._teach(ends.lessons)
        data = ends.data.get("test") or ends.data.get("validate") or ends.data.get("data")
        target = ends.target if self.spec.target.pretrained else None
        with self._at():
            return inspect(
                measure,
                ends.source,
                target,
                data,
                name=str(self.spec.name),
                seed=self.spec.seeds[0],
                recipe=self.content,
                out=self.out,
            )

    def _lesson(self, name: str, model: Any, data: dict[str, Any], listener: Listener | None) -> Lesson:
        """The training of one model on labels."""
        from torch import nn

        from transfuse.distill import Labels
        from transfuse.experiment import Transfer

        spec = self._lessons[name]
        with self._at(f"{name}.train"):
            if not isinstance(model, nn.Module):
                raise InputError(f"a {type(model).__name__} cannot be trained: expected a torch.nn.Module")
            if spec.data is not None:
                data = self._data(f"{name}.train.data", spec.data)
            other = data.pop("source", None)
            if spec.part == "source":
                if other is None:
                    raise InputError("this data set brings no data of another domain: leave out 'part: source'")
                data = {"data": other, "task": data.get("task"), "classes": data.get("classes")}
            transfer = Transfer(
                Labels(),
                target=model,
                **{**data, "task": self.spec.task or data.get("task")},
                out=self.out / name,
                device=self.spec.device,
                name=f"{self.spec.name}: {name}",
                recipe=self.content,
                listener=listener and (lambda _, *update: listener(name, *update)),
                track=self.spec.track,
                **spec.model_dump(exclude_unset=True, exclude={"data", "part"}),
            )
            return Lesson(name, transfer, model)

    def _teach(self, lessons: list[Lesson]) -> None:
        """Train what is to be taught on labels, or read what was taught before."""
        from transfuse.core.checkpoint import load_weights

        for lesson in lessons:
            weights = self.out / lesson.name / "model.safetensors"
            if not weights.exists():
                lesson.transfer.run(resume=True)
            load_weights(weights, lesson.model)

    def _keep(self, transfer: Transfer, shown: bool) -> None:
        """Build the store of a source's answers, or what is missing of it."""
        from transfuse.core.store import Draws, TeacherStore, TopKept
        from transfuse.progress import Counting

        spec = self._sources.get("source")
        if spec is None or spec.store is None or spec.stored:
            return
        folder = self.folder / spec.store.folder if spec.store.folder else self.out / "store"
        shown = shown and transfer.sync.rank == 0
        with self._at("source.store"):
            transfer.store = TeacherStore.build(
                folder,
                transfer.sources["source"],
                transfer.data["data"],
                TopKept(spec.store.top_k) if spec.store.top_k else Draws(spec.store.draws or 50),
                task=transfer.task,
                temperature=spec.store.temperature,
                batch_size=spec.store.batch_size,
                tokenizer=getattr(transfer.sources["source"], "tokenizer", None),
                rank=transfer.sync.rank,
                world=transfer.sync.world,
                say=lambda text: print(text, file=sys.stderr) if shown else None,
                progress=Counting("store") if shown else None,
            )
            transfer.sync.barrier()
            transfer.store = transfer.store or TeacherStore(folder)

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
        given: dict[str, Any] = dict(spec.__pydantic_extra__)
        weight: Any = spec.weight.schedule() if isinstance(spec.weight, Ramp) else spec.weight
        # Of a merge it is an argument: the weights of its models.
        own = isinstance(weight, list) or (isinstance(weight, float) and "weight" in accepts(spec.name))
        if own and "weight" in spec.model_fields_set:
            given["weight"] = weight
        method: Method = call_named("method", {spec.name: takes}, spec.name, given)
        return method if own or weight == 1.0 else method.weighted(weight)

    def _source(self, name: str, spec: SourceSpec) -> Any:
        """A model, or labelled data."""
        from transfuse.core import rng

        if spec.data is not None:
            return self._data(f"{name}.data", spec.data)["data"]
        with self._at(name), rng.scope(rng.derive(name)):
            if spec.stored and spec.store:
                from transfuse.core.store import TeacherStore

                return TeacherStore(self.folder / str(spec.store.folder))
            return self._model(spec)

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
            model = call(self.folder, "model", MODELS, str(spec.model), spec.args)
        if spec.weights is not None:
            load_weights(self.folder / spec.weights, model)
        return model

    def _data(self, place: str, spec: DataSpec | None) -> dict[str, Any]:
        """What a loader returns, as arguments of a transfer; nothing where no data is given."""
        if spec is None:
            return {}
        with self._at(place):
            return self._loaded(spec)

    def _loaded(self, spec: DataSpec) -> dict[str, Any]:
        from transfuse.datasets import DATASETS, Splits

        found = call(self.folder, "data set", DATASETS, spec.name, spec.args)
        if isinstance(found, Splits):
            found = {key: getattr(found, key) for key in ("train", *OTHERS)}
        elif isinstance(found, tuple) and len(found) == 3:
            found = dict(zip(("train", "validate", "test"), found, strict=True))
        if not isinstance(found, Mapping) or "train" not in found:
            raise InputError(
                f"{spec.name} returned a {type(found).__name__}: expected transfuse.datasets.Splits, a tuple (train, "
                "validate, test), or a dict with 'train' and perhaps 'validate', 'test', 'classes', 'task'"
            )
        keys = {
            "train": "data",
            "validation": "validate",
            **{k: k for k in ("validate", "test", "classes", "task", "source")},
        }
        for key in found:
            if key not in keys:
                raise InputError(f"{spec.name} returned {key!r}, which is unknown; {nearest(key, keys)}")
        return {keys[key]: value for key, value in found.items()}

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

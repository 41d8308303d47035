"""Recipes of merges: what `transfuse merge` reads, in our own words or in mergekit's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from transfuse.core import catalogue
from transfuse.core.errors import InputError
from transfuse.core.registry import call_named
from transfuse.recipe.mergekit import is_mergekit, translated
from transfuse.recipe.reading import explain, parse, read_text
from transfuse.recipe.schema import Part

if TYPE_CHECKING:
    from transfuse.weights import Merge, Merged
    from transfuse.weights.checkpoint import Checkpoint


class ParentSpec(Part):
    """A model: a folder or file of weights, perhaps with an adapter of PEFT's that is folded in."""

    short = "model"

    model: str
    adapter: str | None = None


class RangeSpec(ParentSpec):
    """Layers of a model: from the first up to, but without, the second."""

    layers: tuple[int, int]


class HowSpec(Part):
    """A merge by its name, and its arguments."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)
    short = "name"

    name: str

    @field_validator("name")
    @classmethod
    def _merges_weights(cls, name: str) -> str:
        entry = catalogue.find(name)
        if entry.family != "weights":
            raise InputError(f"{entry.name} merges no weights: transfuse methods --family weights lists what does")
        return entry.name


class MergeSpec(Part):
    """A whole recipe of a merge."""

    method: HowSpec
    models: list[ParentSpec] = Field(default_factory=list)
    base: ParentSpec | None = None
    slices: list[list[RangeSpec]] = Field(default_factory=list)
    dtype: str | None = None
    vocabulary: Literal["base", "union", "intersection"] | None = None
    lora: int | None = Field(default=None, ge=1)
    force: bool = False
    out: str | None = None

    @model_validator(mode="after")
    def _one_kind_of_models(self) -> Self:
        if bool(self.models) == bool(self.slices):
            raise InputError("expected 'models' or 'slices', one of them")
        if len({len(part) for part in self.slices}) > 1:
            raise InputError("every slice merges as many models as the others: give each the same number of ranges")
        return self


@dataclass(frozen=True)
class MergeRecipe:
    """A checked recipe of a merge.

    Attributes:
        folder: what paths in it are relative to.
        notes: what a recipe of mergekit's asked for that means nothing here.
        lenient: whether its patterns may fit no tensor, as mergekit's filters may.
    """

    spec: MergeSpec
    folder: Path
    notes: Sequence[str] = ()
    lenient: bool = False

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a YAML file, in our words or in mergekit's.

        Raises:
            InputError: it is not there, or something in it is wrong; the message says what and where.
        """
        path = Path(path)
        content = parse(read_text(path), path)
        notes: list[str] = []
        if theirs := is_mergekit(content):
            content, notes = translated(content)
        try:
            spec = MergeSpec.model_validate(content)
        except ValidationError as error:
            raise InputError(f"{path}: " + "; ".join(explain(details) for details in error.errors())) from None
        return cls(spec, path.parent, notes, theirs)

    @property
    def method(self) -> Merge:
        """The method, with its arguments.

        Raises:
            InputError: it has no such argument, or merges with the help of data.
        """
        from transfuse.weights import Merge

        entry = catalogue.find(self.spec.method.name)
        method = call_named("method", {entry.name: entry.load()}, entry.name, self.spec.method.__pydantic_extra__ or {})
        if not isinstance(method, Merge):
            raise InputError(f"{entry.name} needs more than checkpoints: call transfer({entry.name}(...), ...)")
        return method

    def parents(self) -> tuple[Checkpoint | None, list[Checkpoint]]:
        """The base and what is merged, opened."""
        from transfuse.weights.stack import Stacked

        opened: dict[tuple[str, str | None], Checkpoint] = {}

        def of(spec: ParentSpec) -> Checkpoint:
            key = spec.model, spec.adapter
            if key not in opened:
                opened[key] = self._opened(spec)
            return opened[key]

        base = None if self.spec.base is None else of(self.spec.base)
        if not self.spec.slices:
            return base, [of(spec) for spec in self.spec.models]
        columns = list(zip(*self.spec.slices, strict=True))
        models = [Stacked([(of(part), *part.layers) for part in column]) for column in columns]
        if base is not None:  # the base's own layers beside those of the first model
            base = Stacked([(base, *part.layers) for part in columns[0]])
        return base, list(models)

    def run(
        self,
        out: str | Path | None = None,
        resume: bool = False,
        force: bool = False,
        say: Callable[[str], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Merged:
        """Merge, into the recipe's folder or another one."""
        from transfuse.weights import merge

        if (target := out or (self.spec.out and self.folder / self.spec.out)) is None:
            raise InputError("where to? Give the recipe an 'out', or pass --out FOLDER")
        base, models = self.parents()
        return merge(
            self._fitting(base or models[0]),
            models,
            base,
            target,
            dtype=self.spec.dtype,
            vocabulary=self.spec.vocabulary,
            lora=self.spec.lora,
            resume=resume,
            force=force or self.spec.force,
            say=say,
            progress=progress,
        )

    def plan(self, force: bool = False) -> Any:
        """Everything that is checked before something is written."""
        from transfuse.weights.engine import Plan

        base, models = self.parents()
        return Plan.of(
            self._fitting(base or models[0]),
            models,
            base,
            self.spec.dtype,
            force or self.spec.force,
            self.spec.vocabulary,
        )

    def _fitting(self, reference: Checkpoint) -> Merge:
        """The method, of a lenient recipe without the patterns that fit nothing."""
        method = self.method
        return method.without(method.unknown_patterns(reference.names)) if self.lenient else method

    def _opened(self, spec: ParentSpec) -> Checkpoint:
        from transfuse.weights.folder import open_checkpoint
        from transfuse.weights.lora import WithAdapter

        found = open_checkpoint(self.folder / spec.model)
        return found if spec.adapter is None else WithAdapter(found, self.folder / spec.adapter)

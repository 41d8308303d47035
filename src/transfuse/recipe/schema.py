"""The shape of a recipe, checked key by key; importing it imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from transfuse.core import catalogue
from transfuse.core.catalogue import ARMS
from transfuse.core.errors import InputError, nearest

if TYPE_CHECKING:
    from transfuse.core.clock import Schedule


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


_WEIGHTS = {int: "<number>", float: "<number>", str: "<number>", list: "<list>"}
"""Which form of a weight a value has, by its type."""


class One(Part):
    """One method: its name, its weight among others (or, of a merge, of each model), and its arguments."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)
    short = "name"

    name: str
    weight: Annotated[
        Annotated[float, Tag("<number>")] | Annotated[Ramp, Tag("<ramp>")] | Annotated[list[float], Tag("<list>")],
        Discriminator(lambda value: _WEIGHTS.get(type(value), "<ramp>")),
    ] = 1.0

    @field_validator("name")
    @classmethod
    def _in_catalogue(cls, name: str) -> str:
        return catalogue.find(name).name

    @model_validator(mode="after")
    def _one_weight(self) -> Self:
        if isinstance(self.weight, list) and catalogue.find(self.name).family != "weights":
            raise InputError(f"the weight of {self.name} is {self.weight}: expected a number, or {{linear: [0, 1]}}")
        return self


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
        if getattr(self, "data", None) or (getattr(self, "store", None) and not self.model and not self.huggingface):
            return self
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


class LessonSpec(TrainingSpec):
    """How a model is trained on labels before the transfer begins; on the recipe's data by default.

    `part` is the part of that data: `train`, or `source` where the data set brings another domain.
    """

    data: DataSpec | None = None
    part: Literal["train", "source"] = "train"


class TaughtSpec(ModelSpec):
    """A model that may be trained on labels first."""

    train: LessonSpec | None = None

    @property
    def pretrained(self) -> bool:
        return super().pretrained or self.train is not None


class StoreSpec(Part):
    """What is kept of a teacher's answers on disk, for the arms that learn from it: draws, or the largest k.

    Without a folder of its own it lies in that of the run.
    """

    short = "folder"

    folder: str | None = None
    draws: int | None = None
    top_k: int | None = None
    temperature: float = 1.0
    batch_size: int = 16


class SourceSpec(TaughtSpec):
    """What knows: a model, perhaps with a store of its answers; a store alone; or labelled data of another domain."""

    data: DataSpec | None = None
    store: StoreSpec | None = None

    @property
    def stored(self) -> bool:
        """Whether the source is a store that is there already."""
        return self.store is not None and self.model is None and self.huggingface is None

    @model_validator(mode="after")
    def _store_says_where(self) -> Self:
        if self.stored and self.store and not self.store.folder:
            raise InputError("a source that is a store needs its 'folder', or a 'model' to build it from")
        if self.store and self.store.draws and self.store.top_k:
            raise InputError("a store keeps 'draws' or 'top_k', one of them")
        return self

    @model_validator(mode="after")
    def _data_stands_alone(self) -> Self:
        if self.data and (others := self.model_fields_set - {"data"}):
            raise InputError(f"a source is a model or 'data', found 'data' and {', '.join(sorted(others))}")
        return self


SourceForm = Annotated[
    Annotated[SourceSpec, Tag("<one>")] | Annotated[list[SourceSpec], Field(min_length=1), Tag("<several>")],
    Discriminator(lambda value: "<several>" if isinstance(value, list) else "<one>"),
]


class Content(Part):
    """A whole recipe."""

    name: str | None = None
    method: MethodSpec
    source: SourceForm | None = None
    target: TaughtSpec
    data: DataSpec | None = None
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    compare: list[ArmSpec] = []
    seeds: list[int] = Field([0], min_length=1)
    device: str | None = None
    task: str | None = None
    select: str | None = None
    out: str | None = None
    track: list[str] = []

    @property
    def measures(self) -> bool:
        """Whether the recipe asks for numbers, and trains nothing."""
        return isinstance(self.method, One) and catalogue.find(self.method.name).family == "measure"

    @property
    def trains(self) -> bool:
        """Whether the method trains anything: none of inference does, and no merge of weights alone."""
        if not isinstance(self.method, One):
            return True
        entry = catalogue.find(self.method.name)
        return entry.family not in ("measure", "infer") and (entry.family, entry.card.data) != ("weights", "none")

    @model_validator(mode="after")
    def _says_how_long(self) -> Self:
        if "training" not in self.model_fields_set and self.trains:
            raise InputError("training: is missing")
        return self

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


def _hint(key: str, part: type[Part]) -> str:
    """Where an unknown key belongs, or which known one is meant."""
    homes: dict[str, type[Part]] = {
        "under 'training'": TrainingSpec,
        "under 'source' or 'target'": TaughtSpec,
        "at the top of the recipe": Content,
    }
    for home, other in homes.items():
        if key in other.model_fields and not issubclass(part, other):
            return f"it belongs {home}."
    return nearest(key, part.model_fields)

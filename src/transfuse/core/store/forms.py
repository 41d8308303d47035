"""What is kept of a teacher's answer, and its bytes.

A sample's answer is one record: the entries of its tokens one after the other, or of the sample where it is one
prediction. A form takes entries from logits and packs them; many records are unpacked at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from transfuse.core.errors import InputError
from transfuse.losses.scores import Sampled, TopK

DTYPES: dict[str, Any] = {"float16": np.float16, "float32": np.float32}
BLOCK, ROWS = 64, 16
NO_NUMBERS = "not numbers: look at its weights, its inputs and its precision"


class Form:
    """Base: how much of a distribution, or which layers, are kept.

    A form has a `name` in the store's header, and says what a source of it `gives`.
    """

    name: ClassVar[str]
    gives: ClassVar[frozenset[str]]

    def take(self, logits: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
        """The entries of some tokens of one sample, with the tokens first.

        Args:
            logits: `(tokens, classes)` float32, already divided by the temperature; they do not stay.
            draw: the sample's own random numbers.
        """
        raise NotImplementedError

    def pack(self, entries: Mapping[str, Tensor]) -> bytes:
        """One record."""
        raise NotImplementedError

    def unpack(self, records: Sequence[Any], tokens: Sequence[int], classes: int, temperature: float) -> Any:
        """The entries of all tokens of several records, tokens first: what `Outputs.raw` takes once it is batched."""
        raise NotImplementedError

    def as_header(self) -> dict[str, Any]:
        """What rebuilds it: :func:`form_of`."""
        return {"form": self.name, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Dense(Form):
    """All logits.

    Args:
        dtype: `"float16"` or `"float32"`.
    """

    name: ClassVar = "dense"
    gives: ClassVar = frozenset({"full"})
    dtype: str = "float16"

    def __post_init__(self) -> None:
        _require_dtype(self.dtype)

    def take(self, logits: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
        return {"logits": logits.to(getattr(torch, self.dtype), copy=True)}

    def pack(self, entries: Mapping[str, Tensor]) -> bytes:
        return entries["logits"].contiguous().numpy().tobytes()

    def unpack(self, records: Sequence[Any], tokens: Sequence[int], classes: int, temperature: float) -> Tensor:
        values = np.concatenate([np.frombuffer(record, DTYPES[self.dtype]) for record in records])
        return torch.from_numpy(values.reshape(-1, classes)).float()


@dataclass(frozen=True)
class TopKept(Form):
    """The k largest probabilities; the mass of the rest follows from them.

    Args:
        k: how many, at least 1.
        dtype: of the log-probabilities, `"float16"` or `"float32"`.
    """

    name: ClassVar = "topk"
    gives: ClassVar = frozenset({"topk"})
    k: int = 64
    dtype: str = "float16"

    def __post_init__(self) -> None:
        _require_dtype(self.dtype)
        if self.k < 1:
            raise InputError(f"TopKept: k is {self.k}, it must be 1 or more")

    def take(self, logits: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
        if self.k > logits.shape[-1]:
            raise InputError(f"TopKept: k is {self.k}, the teacher has {logits.shape[-1]} classes: use Dense()")
        kept = logits.log_softmax(-1).topk(self.k)
        return {"ids": kept.indices.int(), "log_probabilities": kept.values.to(getattr(torch, self.dtype))}

    def pack(self, entries: Mapping[str, Tensor]) -> bytes:
        return entries["ids"].numpy().tobytes() + entries["log_probabilities"].numpy().tobytes()

    def unpack(self, records: Sequence[Any], tokens: Sequence[int], classes: int, temperature: float) -> TopK:
        ids, values = [], []
        for record, count in zip(records, tokens, strict=True):
            end = count * self.k * 4
            ids.append(np.frombuffer(record[:end], np.int32))
            values.append(np.frombuffer(record[end:], DTYPES[self.dtype]))
        shape = (-1, self.k)
        return TopK(
            torch.from_numpy(np.concatenate(ids).reshape(shape).astype(np.int64)),
            torch.from_numpy(np.concatenate(values).reshape(shape).astype(np.float32)),
            classes,
            temperature,
        )


@dataclass(frozen=True)
class Draws(Form):
    """Tokens drawn with replacement, and how often each came: unbiased, and small (RS-KD, arXiv:2503.16870).

    An entry is an id of 17 bits and a count of 7, so three bytes; a row of a language model has about twelve.

    Args:
        n: draws per token, 1 to 127.
    """

    name: ClassVar = "draws"
    gives: ClassVar = frozenset({"sampled"})
    n: int = 50

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 127:
            raise InputError(f"Draws: n is {self.n}; counts have 7 bits, so 1 to 127 can be drawn")

    def take(self, logits: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
        if logits.shape[-1] > 2**17:
            raise InputError(f"Draws: the teacher has {logits.shape[-1]} classes; ids have 17 bits: use TopKept")
        drawn, _ = draw_tokens(logits, self.n, draw).sort(-1)
        first = torch.ones_like(drawn, dtype=torch.bool)
        first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        begins = torch.cat([first.flatten().nonzero()[:, 0], torch.tensor([drawn.numel()])])
        return {"ids": drawn[first], "counts": begins.diff(), "distinct": first.sum(-1)}

    def pack(self, entries: Mapping[str, Tensor]) -> bytes:
        pairs = (entries["ids"] | entries["counts"] << 17).numpy().astype("<u4")
        three = pairs.view(np.uint8).reshape(-1, 4)[:, :3]
        return entries["distinct"].numpy().astype(np.uint8).tobytes() + three.tobytes()

    def unpack(self, records: Sequence[Any], tokens: Sequence[int], classes: int, temperature: float) -> Sampled:
        distinct = np.concatenate([np.frombuffer(r[:n], np.uint8) for r, n in zip(records, tokens, strict=True)])
        three = np.concatenate([np.frombuffer(r[n:], np.uint8) for r, n in zip(records, tokens, strict=True)])
        four = np.zeros((len(three) // 3, 4), np.uint8)
        four[:, :3] = three.reshape(-1, 3)
        pairs = torch.from_numpy(four.view("<u4")[:, 0].astype(np.int64))
        there = torch.arange(max(distinct.tolist(), default=0)) < torch.from_numpy(distinct)[:, None]
        ids, counts = torch.zeros(there.shape, dtype=torch.long), torch.zeros(there.shape, dtype=torch.long)
        ids[there], counts[there] = pairs & (2**17 - 1), pairs >> 17
        return Sampled(ids, counts, classes, temperature)


@dataclass(frozen=True)
class Layers(Form):
    """Features of layers, for methods that match them.

    Args:
        names: the taps, as a method asks for them (see :mod:`transfuse.core.taps`).
        pooled: keep their mean over a sample's tokens, as an embedding of the whole.
        dtype: `"float16"` or `"float32"`.
    """

    name: ClassVar = "layers"
    gives: ClassVar = frozenset({"features"})
    names: tuple[str, ...] = ("penultimate",)
    pooled: bool = False
    dtype: str = "float16"

    def __post_init__(self) -> None:
        _require_dtype(self.dtype)
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names or any("*" in name for name in self.names):
            raise InputError(f"Layers: name single layers, found {self.names}")


def draw_tokens(logits: Tensor, n: int, draw: torch.Generator) -> Tensor:
    """n tokens of each row, drawn with replacement from its softmax, `(tokens, n)`.

    The inverse of the distribution function, summed in float64: first over blocks of classes, then within the block.

    Args:
        logits: `(tokens, classes)` float32.

    Raises:
        InputError: a row has no largest number.
    """
    if short := -logits.shape[-1] % BLOCK:
        logits = F.pad(logits, (0, short), value=-torch.inf)
    tokens, sums = len(logits), _sums(logits)
    if not (sums.sum(-1).log().abs() < 20).all():  # weights may have been too small or too large to be numbers
        logits = logits - logits.amax(-1, keepdim=True)
        sums = _sums(logits)
    until = sums.cumsum(-1, dtype=torch.float64)
    if not until[:, -1].isfinite().all():
        raise InputError(f"nothing can be drawn from a teacher whose logits are {NO_NUMBERS}")
    at = torch.rand(tokens, n, generator=draw, dtype=torch.float64) * until[:, -1:]
    block = torch.searchsorted(until, at, right=True).clamp(max=until.shape[1] - 1)
    before = F.pad(until, (1, 0)).gather(1, block)
    own = logits.unflatten(-1, (-1, BLOCK))[torch.arange(tokens)[:, None], block].exp_()
    inside = own.cumsum(-1, dtype=torch.float64)
    found = torch.searchsorted(inside, (at - before)[..., None], right=True)[..., 0]
    # Sums in another order may end a rounding short of the block's; then it is the last class with any mass.
    beyond = (found == BLOCK).nonzero(as_tuple=True)
    found[beyond] = BLOCK - (inside[beyond] == inside[beyond][..., -1:]).sum(-1)
    return block * BLOCK + found


def _sums(logits: Tensor) -> Tensor:
    """Of exp(logits) in every block, `(tokens, blocks)`; as many rows at a time as fit into a processor's cache."""
    weights = torch.empty_like(logits[:ROWS])
    return torch.cat(
        [torch.exp(rows, out=weights[: len(rows)]).unflatten(-1, (-1, BLOCK)).sum(-1) for rows in logits.split(ROWS)]
    )


def form_of(header: Mapping[str, Any]) -> Form:
    """The form that a store's header describes."""
    given = dict(header)
    kind = {form.name: form for form in (Dense, TopKept, Draws, Layers)}[given.pop("form")]
    return kind(**given)


def _require_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, it must be {' or '.join(map(repr, DTYPES))}")

"""What may stand in the place of logits, so that nobody has to build `(tokens, vocabulary)`.

A :class:`Projection` is logits that have not been computed, :class:`TopK` and :class:`Sampled` are what was kept of a
teacher's distribution. Leading dimensions are free: `(tokens, ...)` or `(batch, tokens, ...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Projection:
    """Logits `hidden @ weight.T + bias` before the product is taken.

    Attributes:
        hidden: `(..., dim)`, the input of the output layer.
        weight: `(vocabulary, dim)`.
        bias: `(vocabulary,)` or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the logits, `(..., vocabulary)`."""
        return (*self.hidden.shape[:-1], self.weight.shape[0])

    def dense(self) -> Tensor:
        """The logits, `(..., vocabulary)`."""
        bias = None if self.bias is None else self.bias.to(self.hidden.dtype)
        return F.linear(self.hidden, self.weight.to(self.hidden.dtype), bias)

    def on_samples(self, change: Callable[[Tensor], Tensor]) -> Projection:
        """The same with something done to what belongs to samples: a choice of rows, another device."""
        return replace(self, hidden=change(self.hidden))


@dataclass(frozen=True, slots=True)
class TopK:
    """The k largest probabilities of each row; the rest of the mass is the tail.

    Attributes:
        ids: `(..., k)` int64.
        log_probabilities: `(..., k)` float, natural logarithms at `temperature`; -inf fills up.
        classes: size of the vocabulary.
        temperature: that the logits were divided by.
    """

    ids: Tensor
    log_probabilities: Tensor
    classes: int
    temperature: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the distribution this was kept of, `(..., classes)`."""
        return (*self.ids.shape[:-1], self.classes)

    def on_samples(self, change: Callable[[Tensor], Tensor]) -> TopK:
        """The same with something done to what belongs to samples: a choice of rows, another device."""
        return replace(self, ids=change(self.ids), log_probabilities=change(self.log_probabilities))


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens drawn with replacement from each row, and how often each came.

    An unbiased record of the distribution: the expectation of counts / sum(counts) is the teacher's probabilities.

    Attributes:
        ids: `(..., n)` int64, distinct in a row.
        counts: `(..., n)` integers; 0 fills up.
        classes: size of the vocabulary.
        temperature: that the logits were divided by.
    """

    ids: Tensor
    counts: Tensor
    classes: int
    temperature: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the distribution this was kept of, `(..., classes)`."""
        return (*self.ids.shape[:-1], self.classes)

    @property
    def shares(self) -> Tensor:
        """Counts as shares of all draws of a row, `(..., n)` float32; a row without draws is all 0."""
        return self.counts / self.counts.sum(-1, keepdim=True).clamp(min=1)

    def on_samples(self, change: Callable[[Tensor], Tensor]) -> Sampled:
        """The same with something done to what belongs to samples: a choice of rows, another device."""
        return replace(self, ids=change(self.ids), counts=change(self.counts))


Scores = Tensor | Projection
"""A student's or a teacher's whole distribution."""
Target = Tensor | Projection | TopK | Sampled
"""What a student can be compared with."""


def positions(scores: Scores, mask: Tensor | None = None) -> Scores:
    """The scores of the positions that count, `(rows, classes)`.

    Args:
        mask: `(batch,)` or `(batch, tokens)`; None counts all.
    """
    if isinstance(scores, Projection):
        return scores.on_samples(lambda hidden: hidden.flatten(0, -2) if mask is None else hidden[mask])
    return scores.flatten(0, -2) if mask is None else scores[mask]


def in_parts(scores: Scores, rows: int, mask: Tensor | None = None, room: Tensor | None = None) -> Iterator[Tensor]:
    """The logits of the positions that count, so many rows at a time: of a projection no more of them exist.

    Nothing can be learned through them. A part may lie where the one before it lay: copy what you keep of it.

    Args:
        room: `(rows, classes)` of the hidden states' type, for the logits of a projection; who takes parts of many
            batches keeps it, for new memory costs a good part of what the logits do.
    """
    chosen = positions(scores, mask)
    if not isinstance(chosen, Projection):
        yield from chosen.detach().split(rows)
        return
    hidden = chosen.hidden.detach()
    weight = chosen.weight.detach().to(hidden.dtype)
    if room is None:
        room = hidden.new_empty(min(rows, len(hidden)), len(weight))
    for part in hidden.split(rows):
        logits = torch.mm(part, weight.T, out=room[: len(part)])
        yield logits if chosen.bias is None else logits.add_(chosen.bias.detach())

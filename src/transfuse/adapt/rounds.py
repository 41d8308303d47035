"""The data of a round of active learning: updates on the whole pool, then a second pass over the labelled samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from transfuse.core import rng
from transfuse.core.batch import Batch
from transfuse.core.errors import InputError
from transfuse.core.streams import Data, Draw, Indexed, even


@dataclass(frozen=True)
class Round:
    """What is known in a round, and how long its epochs are.

    Attributes:
        pool: all samples; their labels are not looked at.
        free: samples without a label; an epoch draws `limit` of them.
        bought: samples with a label, and `labels`, what it is.
        again: whether an epoch ends with a second pass over the labelled samples that it drew.
    """

    pool: Indexed
    free: Tensor
    limit: int
    bought: Tensor
    labels: Tensor
    again: bool

    def lengths(self, batch_size: int) -> tuple[int, int]:
        """Updates of an epoch in which both kinds of samples are drawn, and in its second pass."""
        first = math.ceil(self.limit / batch_size)
        drawn = sum(j - i for i, j in itertools.islice(itertools.cycle(self._parts(batch_size)), first))
        return first, math.ceil(drawn / batch_size) if self.again else 0

    def labelled(self, draw: Draw) -> list[Tensor]:
        """Positions in `bought` by update: again and again in a new order, then all that was drawn once more."""
        first, second = self.lengths(draw.batch_size)
        orders = (_order(len(self.bought), draw, "labelled", cycle) for cycle in itertools.count())
        parts = (order[i:j] for order in orders for i, j in self._parts(draw.batch_size))
        updates = list(itertools.islice(parts, first))
        drawn = torch.cat(updates)
        mixed = drawn[_order(len(drawn), draw, "again")]
        return updates + [mixed[i:j] for i, j in even(len(drawn), second or 1)[:second]]

    def unlabelled(self, draw: Draw) -> list[Tensor]:
        """Samples of the pool by update, none in the second pass."""
        first, second = self.lengths(draw.batch_size)
        order = self.free[_order(len(self.free), draw, "unlabelled")]
        return [order[i:j] for i, j in even(self.limit, first)] + [order[:0]] * second

    def _parts(self, batch_size: int) -> list[tuple[int, int]]:
        return even(len(self.bought), math.ceil(len(self.bought) / batch_size))


@dataclass(frozen=True)
class Unlabelled(Data):
    """The stream of samples without a label; batches of the second pass are empty."""

    round: Round

    def updates(self, batch_size: int) -> int:
        return sum(self.round.lengths(batch_size))

    def epoch(self, draw: Draw, start: int) -> Iterator[list[Batch]]:
        for rows in self.round.unlabelled(draw)[start:]:
            if len(rows):
                yield [self.round.pool.fetch(rows[i:j]).without_labels() for i, j in _shares(rows, draw)]
            else:
                yield [Batch() for _ in draw.split(draw.batch_size)]

    def sample(self, size: int) -> Batch:
        return self.round.pool.fetch(self.round.free[:size]).without_labels()


@dataclass(frozen=True)
class Labelled(Data):
    """The stream of samples with the label that was bought; `row` is their position among them."""

    round: Round

    def updates(self, batch_size: int) -> int:
        return sum(self.round.lengths(batch_size))

    def epoch(self, draw: Draw, start: int) -> Iterator[list[Batch]]:
        for rows in self.round.labelled(draw)[start:]:
            yield [self._fetch(rows[i:j]) for i, j in _shares(rows, draw)]

    def sample(self, size: int) -> Batch:
        return self._fetch(torch.arange(min(size, len(self.round.bought))))

    def _fetch(self, rows: Tensor) -> Batch:
        batch = self.round.pool.fetch(self.round.bought[rows]).without_labels()
        return Batch(batch, labels=self.round.labels[rows], row=rows)


def _order(size: int, draw: Draw, *purpose: object) -> Tensor:
    if not draw.shuffle:
        return torch.arange(size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(rng.derive(draw.seed, *purpose)))


def _shares(rows: Tensor, draw: Draw) -> list[tuple[int, int]]:
    if len(rows) < draw.world:
        raise InputError(
            f"an update of {len(rows)} samples cannot be shared by {draw.world} processes: buy more labels"
        )
    return draw.split(len(rows))

"""Several pools of data as one endless stream whose shares may change while it runs.

Every sample's pool is drawn on its own, and both draws (which pool, which sample of it) are a pure function of
(seed, position): a position is one integer, resume is exact, and every process sees the same stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from transfuse.core import rng
from transfuse.core.batch import Batch, joined
from transfuse.core.errors import InputError
from transfuse.core.streams import Data, Draw, Indexed

Shares = Callable[[Tensor], Tensor]
"""From positions `(samples,)`, counted from the first sample drawn, to the probability of each pool there,
`(samples, pools)`."""


class Mixture(Data):
    """Samples of several pools, each drawn with the probability that its pool has at that position.

    A pool is read in a shuffled order and shuffled anew when it is exhausted. There are no epochs: how long to
    train is said in steps.

    Args:
        pools: by name; their samples are read by number.
        shares: see :data:`Shares`.

    Raises:
        InputError: a pool is no data set.
    """

    def __init__(self, pools: Mapping[str, Data], shares: Shares):
        self.pools: dict[str, Indexed] = {}
        for name, pool in pools.items():
            if not isinstance(pool, Indexed):
                raise InputError(f"the pool {name!r} is read as a {type(pool).__name__}: a mixture needs data sets")
            self.pools[name] = pool
        self.shares = shares

    def updates(self, batch_size: int) -> None:
        return None

    def epoch(self, draw: Draw, start: int) -> Iterator[list[Batch]]:
        consumed = self.counts(draw, start)
        for update in range(start, 2**62):
            chosen = self._chosen(draw, update)
            rows = torch.empty_like(chosen)
            for number, (name, pool) in enumerate(self.pools.items()):
                mine = chosen == number
                count = int(mine.sum())
                rows[mine] = _rows(pool.size, int(consumed[number]), count, draw, name)
                consumed[number] += count
            yield [self._fetch(chosen[i:j], rows[i:j]) for i, j in draw.split(len(chosen))]

    def sample(self, size: int) -> Batch | None:
        pools = list(self.pools.values())
        each = max(1, size // len(pools))
        return joined([pool.fetch(torch.arange(min(each, pool.size))) for pool in pools])

    def counts(self, draw: Draw, updates: int) -> Tensor:
        """How many samples of each pool the first updates take, `(pools,)`."""
        found = torch.zeros(len(self.pools), dtype=torch.long)
        for update in range(updates):
            found += torch.bincount(self._chosen(draw, update), minlength=len(self.pools))
        return found

    def _chosen(self, draw: Draw, update: int) -> Tensor:
        """The pool of every sample of an update, `(samples,)`."""
        at = torch.arange(update * draw.batch_size, (update + 1) * draw.batch_size)
        bounds = self.shares(at).double().cumsum(1)
        generator = torch.Generator().manual_seed(rng.derive(draw.seed, "pools", update))
        uniform = torch.rand(len(at), 1, generator=generator, dtype=torch.float64)
        # Scaled, so that rounding of the last bound cannot let a sample fall beyond it.
        return (uniform * bounds[:, -1:] >= bounds).sum(1)

    def _fetch(self, chosen: Tensor, rows: Tensor) -> Batch:
        """One micro-batch in the order of the stream."""
        parts, places = [], []
        for number, pool in enumerate(self.pools.values()):
            mine = (chosen == number).nonzero().flatten()
            if len(mine):
                parts.append(Batch(pool.fetch(rows[mine]), domain=torch.full((len(mine),), number)))
                places.append(mine)
        return joined(parts).take(torch.cat(places).argsort())


def _rows(size: int, begin: int, count: int, draw: Draw, name: str) -> Tensor:
    """The next rows of a pool after `begin` of them were taken, over as many shuffled passes as it needs."""
    found: list[Tensor] = []
    while count:
        turn, offset = divmod(begin, size)
        generator = torch.Generator().manual_seed(rng.derive(draw.seed, "rows", name, turn))
        order = torch.randperm(size, generator=generator) if draw.shuffle else torch.arange(size)
        found.append(order[offset : offset + count])
        begin, count = begin + len(found[-1]), count - len(found[-1])
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)


def interpolated(anchors: Sequence[Tensor], growth: Callable[[Tensor], Tensor], length: float) -> Shares:
    """Shares that move along anchors, from the first at position 0 to the last from position `length` on.

        p(t) = (1 - g) a_k + g a_{k+1},   g the part of the way between the anchors that growth(min(1, t / length)) has

    Args:
        anchors: two or more probability vectors `(pools,)`.
        growth: monotone from [0, 1] to [0, 1], with 1 at 1.
        length: in samples; 0 is at the last anchor at once.
    """
    path = torch.stack(list(anchors)).double()

    def shares(at: Tensor) -> Tensor:
        progress = torch.ones(len(at)) if length <= 0 else (at.double() / length).clamp(max=1)
        way = growth(progress.double()) * (len(path) - 1)
        k = way.floor().long().clamp(max=len(path) - 2)
        return torch.lerp(path[k], path[k + 1], (way - k)[:, None])

    return shares

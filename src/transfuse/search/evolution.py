"""Evolution under a budget: the best parents of each generation are changed and mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transfuse.core.errors import InputError
from transfuse.search.space import Space, Spec

TRIES = 1000
"""Draws until a network within the budget must have been found."""

Fitness = Callable[[Sequence[Spec]], Tensor]
"""From networks to how good they are, `(networks,)`."""


def evolve(
    space: Space,
    fitness: Fitness,
    cost: Callable[[Spec], float],
    budget: float,
    generator: torch.Generator,
    population: int = 100,
    iterations: int = 500,
    parents: float = 0.25,
    mutation: float = 0.1,
) -> Spec:
    """The fittest quantised network that costs no more than the budget, as far as evolution finds it.

    Every iteration keeps the best part as parents and adds as many children again as the population holds: half of
    them mutants (every block, and the depth, drawn anew with probability `mutation`), half crossings (every block from
    either parent). Networks beyond the budget are drawn again.

    Raises:
        InputError: no network within the budget was found in 1,000 draws; the message has the least cost seen.
    """
    people = [_within(partial(space.draw, generator, True), cost, budget) for _ in range(population)]
    scores = fitness(people)
    for _ in range(iterations):
        order = scores.argsort(descending=True)[: max(2, round(parents * population))]
        best = [people[int(i)] for i in order]
        pairs = [(_one_of(best, generator), _one_of(best, generator)) for _ in range(population)]
        half = population // 2
        children = [
            _within(partial(_mutated, space, parent, mutation, generator), cost, budget) for parent, _ in pairs[:half]
        ] + [_within(partial(_crossed, space, *both, generator), cost, budget) for both in pairs[half:]]
        people, scores = [*best, *children], torch.cat([scores[order], fitness(children)])
    return people[int(scores.argmax())]


def _one_of(specs: Sequence[Spec], generator: torch.Generator) -> Spec:
    return specs[int(torch.randint(len(specs), (1,), generator=generator))]


def _within(make: Callable[[], Spec], cost: Callable[[Spec], float], budget: float) -> Spec:
    least = float("inf")
    for _ in range(TRIES):
        spec = make()
        if (found := cost(spec)) <= budget:
            return spec
        least = min(least, found)
    raise InputError(
        f"no network within the budget {budget:.4g} in {TRIES} draws; the cheapest of them costs {least:.4g}: raise it"
    )


def _mutated(space: Space, spec: Spec, probability: float, generator: torch.Generator) -> Spec:
    fresh = space.draw(generator, True)
    change = torch.rand(space.blocks + 1, generator=generator) < probability
    return _mixed(space, spec, fresh, change)


def _crossed(space: Space, one: Spec, other: Spec, generator: torch.Generator) -> Spec:
    return _mixed(space, one, other, torch.rand(space.blocks + 1, generator=generator) < 0.5)


def _mixed(space: Space, one: Spec, other: Spec, take: Tensor) -> Spec:
    """Block by block from one or, where `take` says so, the other; its last entry is about the depth."""
    assert one.bits is not None
    assert other.bits is not None
    from_other = take.tolist()

    def each(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(y if t else x for x, y, t in zip(a, b, from_other[:-1], strict=True))

    mixed = replace(
        one,
        depth=other.depth if from_other[-1] else one.depth,
        kernels=each(one.kernels, other.kernels),
        widths=each(one.widths, other.widths),
        bits=each(one.bits, other.bits),
    )
    return mixed if space.valid(mixed) else one

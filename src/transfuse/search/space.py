"""A space of networks: what can be chosen, how a choice is written as numbers, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from transfuse.core.errors import InputError

LAYERS = ("pointwise weights", "pointwise activations", "depthwise weights", "depthwise activations")
"""What has a bit-width of its own in every block."""
FULL = 8
"""Bits that count as full precision: a code of 8 bits everywhere is that of a network that is not quantised."""


@dataclass(frozen=True)
class Spec:
    """One network of the space. Blocks beyond `depth` are skipped; what is said of them means nothing.

    Attributes:
        depth: blocks in use.
        kernels, widths: of every block.
        bits: of every block, four numbers in the order of :data:`LAYERS`; None is a network in full precision.
    """

    depth: int
    kernels: tuple[int, ...]
    widths: tuple[int, ...]
    bits: tuple[tuple[int, ...], ...] | None = None

    def used(self) -> tuple[object, ...]:
        """What tells this network from others: two specs with the same parts in use are the same network."""
        bits = None if self.bits is None else self.bits[: self.depth]
        return self.depth, self.kernels[: self.depth], self.widths[: self.depth], bits


@dataclass(frozen=True)
class Space:
    """Blocks with a choice of kernel, width (channel pruning), depth and bits.

    Args:
        blocks: how many there are at most.
        kernels, widths, depths, bits: the choices, ascending.

    Raises:
        InputError: a choice is empty, or a depth is larger than the number of blocks.
    """

    blocks: int
    kernels: tuple[int, ...]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    bits: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("kernels", "widths", "depths", "bits"):
            choices = getattr(self, name)
            if not choices or list(choices) != sorted(set(choices)):
                raise InputError(f"{name} are {choices}: expected different numbers, ascending")
        if self.depths[-1] > self.blocks:
            raise InputError(f"depths are {self.depths}, but there are {self.blocks} blocks")

    @property
    def half(self) -> int:
        """Length of the architecture's part of a code."""
        return self.blocks * (len(self.kernels) + len(self.widths))

    @property
    def length(self) -> int:
        """Length of a code."""
        return self.half + self.blocks * len(LAYERS) * len(self.bits)

    def largest(self) -> Spec:
        """Everything at its most, in full precision."""
        n = self.blocks
        return Spec(self.depths[-1], (self.kernels[-1],) * n, (self.widths[-1],) * n)

    def smallest(self) -> Spec:
        """Everything at its least, in full precision."""
        return Spec(self.depths[0], (self.kernels[0],) * self.blocks, (self.widths[0],) * self.blocks)

    def valid(self, spec: Spec) -> bool:
        """Whether a network may be built: kernels of 7 do not go with depthwise activations of 4 bits."""
        bits = spec.bits or ()
        return not any(k == 7 and b[3] == 4 for k, b in list(zip(spec.kernels, bits, strict=False))[: spec.depth])

    def draw(self, generator: torch.Generator, quantised: bool) -> Spec:
        """A random valid network."""
        while True:
            spec = Spec(
                _pick(self.depths, generator),
                tuple(_pick(self.kernels, generator) for _ in range(self.blocks)),
                tuple(_pick(self.widths, generator) for _ in range(self.blocks)),
                tuple(self.draw_bits(generator) for _ in range(self.blocks)) if quantised else None,
            )
            if self.valid(spec):
                return spec

    def draw_bits(self, generator: torch.Generator) -> tuple[int, ...]:
        """Random bits of one block."""
        return tuple(_pick(self.bits, generator) for _ in LAYERS)

    def encode(self, spec: Spec) -> Tensor:
        """The code of a network, `(length,)`: one-hots of each block's kernel and width, then of its four bits.

        Skipped blocks are all zeros; a network in full precision has the code of the most bits everywhere.

        Raises:
            InputError: the network is not of this space, or not valid.
        """
        if not self.valid(spec) or spec.depth not in self.depths:
            raise InputError(f"{spec} is no valid network of {self}")
        architecture = torch.zeros(self.blocks, len(self.kernels) + len(self.widths))
        bits = torch.zeros(self.blocks, len(LAYERS), len(self.bits))
        for i in range(spec.depth):
            architecture[i, _index(self.kernels, spec.kernels[i], "kernel")] = 1
            architecture[i, len(self.kernels) + _index(self.widths, spec.widths[i], "width")] = 1
            for j in range(len(LAYERS)):
                own = self.bits[-1] if spec.bits is None else spec.bits[i][j]
                bits[i, j, _index(self.bits, own, "number of bits")] = 1
        return torch.cat([architecture.flatten(), bits.flatten()])

    def decode(self, code: Tensor) -> Spec:
        """The quantised network of a code. Skipped blocks come back with the first of every choice."""
        architecture = code[: self.half].view(self.blocks, -1)
        bits = code[self.half :].view(self.blocks, len(LAYERS), -1)
        return Spec(
            int((architecture.sum(1) > 0).sum()),
            tuple(self.kernels[int(row[: len(self.kernels)].argmax())] for row in architecture),
            tuple(self.widths[int(row[len(self.kernels) :].argmax())] for row in architecture),
            tuple(tuple(self.bits[int(row.argmax())] for row in block) for block in bits),
        )

    def specs(self, quantised: bool) -> list[Spec]:
        """Every valid network of a small space, each once."""
        each = [self.kernels, self.widths, *([self.bits] * len(LAYERS) if quantised else [])]
        found = {}
        for depth in self.depths:
            for blocks in product(product(*each), repeat=depth):
                rest = [tuple(choices[0] for choices in each)] * (self.blocks - depth)
                rows = [*blocks, *rest]
                bits = tuple(row[2:] for row in rows) if quantised else None
                spec = Spec(depth, tuple(r[0] for r in rows), tuple(r[1] for r in rows), bits)
                if self.valid(spec):
                    found[spec.used()] = spec
        return list(found.values())


def _pick(choices: Sequence[int], generator: torch.Generator) -> int:
    return choices[int(torch.randint(len(choices), (1,), generator=generator))]


def _index(choices: Sequence[int], value: int, what: str) -> int:
    if value not in choices:
        raise InputError(f"{value} is no {what} of this space: expected one of {choices}")
    return choices.index(value)

"""Weights as a few bits each: rounding that makes up for its errors (GPTQ), and codes packed into bytes.

Source: Frantar et al., ICLR 2023, arXiv:2210.17323.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from transfuse.core.errors import InputError

INTEGERS, FLOATS = (2, 3, 4, 8), {16: torch.float16, 32: torch.float32}
GROUP = 128
"""Columns that share a scale and a zero."""


@dataclass(frozen=True)
class Quantised:
    """A matrix `(rows, columns)` in `bits` per entry: (code - zero) * scale, one scale and zero per row and group.

    Attributes:
        codes: bytes, `bits` bits for each entry one after the other; for 16 and 32 bits the numbers themselves.
        scale, zero: `(rows, groups)` float16 and uint8; empty for 16 and 32 bits.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    shape: tuple[int, int]
    group: int = GROUP

    @classmethod
    def of(cls, weight: Tensor, grid: Grid) -> Quantised:
        """Every entry rounded to the nearest code."""
        if grid.bits in FLOATS:
            empty = torch.empty(0)
            return cls(weight.to(FLOATS[grid.bits]), empty.half(), empty.to(torch.uint8), grid.bits, _two(weight))
        codes = grid.codes(weight, torch.arange(weight.shape[1], device=weight.device))
        return cls(
            pack_bits(codes, grid.bits), grid.scale, grid.zero.to(torch.uint8), grid.bits, _two(weight), grid.group
        )

    def dense(self) -> Tensor:
        """The matrix in float32."""
        if self.bits in FLOATS:
            return self.codes.float()
        codes = unpack_bits(self.codes, self.bits, self.shape[0] * self.shape[1]).view(self.shape)
        of = torch.arange(self.shape[1], device=codes.device) // self.group
        return (codes.float() - self.zero.float()[:, of]) * self.scale.float()[:, of]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """As it is stored."""
        facts = torch.tensor([self.bits, *self.shape, self.group])
        found = {"codes": self.codes, "scale": self.scale, "zero": self.zero, "facts": facts}
        return {f"{prefix}{name}": value for name, value in found.items() if value.numel()}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], prefix: str) -> Quantised:
        """What :meth:`tensors` gave."""
        bits, rows, columns, group = tensors[f"{prefix}facts"].tolist()
        empty = torch.empty(0)
        scale, zero = tensors.get(f"{prefix}scale", empty), tensors.get(f"{prefix}zero", empty)
        return cls(tensors[f"{prefix}codes"], scale, zero, bits, (rows, columns), group)


@dataclass(frozen=True)
class Grid:
    """The numbers that an entry can be rounded to: fixed beforehand, for every row and group of neighbouring columns.

    Raises:
        InputError: (from :meth:`of`) a number of bits that is none of 2, 3, 4, 8, 16 and 32.
    """

    bits: int
    scale: Tensor
    zero: Tensor
    group: int

    @classmethod
    def of(cls, weight: Tensor, bits: int, group: int = GROUP, symmetric: bool = False) -> Grid:
        """From the smallest to the largest number of each group, zero among them."""
        check_bits(bits)
        if bits in FLOATS:
            return cls(bits, torch.empty(0), torch.empty(0), group)
        parts = weight.split(group, dim=1)
        low = torch.stack([p.amin(1) for p in parts], 1).clamp(max=0)
        high = torch.stack([p.amax(1) for p in parts], 1).clamp(min=0)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        # In float16, as it is stored: what is rounded must be what is read.
        scale = ((high - low) / (2**bits - 1)).clamp(min=1e-7).half()
        zero = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scale.float()).round()
        return cls(bits, scale, zero.clamp(0, 2**bits - 1), group)

    def codes(self, values: Tensor, columns: Tensor) -> Tensor:
        """The codes of some columns, `(rows, len(columns))`."""
        of = columns // self.group
        return (values / self.scale.float()[:, of] + self.zero[:, of]).round().clamp(0, 2**self.bits - 1).long()

    def rounded(self, values: Tensor, columns: Tensor) -> Tensor:
        """What is read back of them."""
        of = columns // self.group
        return (self.codes(values, columns) - self.zero[:, of]) * self.scale.float()[:, of]


def gptq(
    weight: Tensor,
    gram: Tensor,
    bits: int,
    group: int = GROUP,
    symmetric: bool = False,
    damp: float = 0.01,
    act_order: bool = True,
) -> Quantised:
    """Round a layer's weight column by column; what a column loses, those that come after it make up for.

    It minimises ||(W - Wq) X|| greedily: with H = 2 X X^T + damp * mean(diag) I and U the upper Cholesky factor of its
    inverse, the error of column j, divided by U_jj, is taken from the columns k > j with weight U_jk.

    Args:
        weight: `(rows, columns)`. gram: X X^T of the layer's inputs, `(columns, columns)`.
        act_order: columns with the largest inputs first.
        damp: as a share of the mean of the diagonal.

    Raises:
        InputError: the number of bits is unknown.
    """
    grid = Grid.of(weight.float(), bits, group, symmetric)
    if bits in FLOATS:
        return Quantised.of(weight.float(), grid)
    hessian = 2 * gram.double()
    diagonal = hessian.diagonal()
    diagonal += damp * diagonal.mean().clamp(min=1e-12)
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(gram), device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    left = weight.float()[:, order].clone()
    found = torch.empty_like(left)
    for j in range(left.shape[1]):
        found[:, j] = grid.rounded(left[:, j : j + 1], order[j : j + 1])[:, 0]
        error = (left[:, j] - found[:, j]) / upper[j, j]
        left[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return Quantised.of(found[:, order.argsort()], grid)


def check_bits(bits: int) -> None:
    """Refuse numbers of bits that are not stored."""
    if bits not in (*INTEGERS, *FLOATS):
        raise InputError(f"bits is {bits}, known are {', '.join(map(str, (*INTEGERS, *FLOATS)))}")


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits as bytes, the lowest bit of each first."""
    single = (codes.flatten()[:, None] >> torch.arange(bits, device=codes.device)) & 1
    single = torch.nn.functional.pad(single.flatten(), (0, -single.numel() % 8)).view(-1, 8)
    return (single << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes that were packed."""
    single = (packed.long()[:, None] >> torch.arange(8, device=packed.device)) & 1
    single = single.flatten()[: count * bits].view(count, bits)
    return (single << torch.arange(bits, device=packed.device)).sum(1)


def _two(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]

"""Fake quantisation: numbers rounded to a few bits, with gradients as if they were not."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fake_quantise(values: Tensor, bits: int, bound: Tensor, signed: bool) -> Tensor:
    """Values clipped to a range and rounded to the nearest of its steps, uniform in between.

        step  = bound / (2^bits - 1),  range [0, bound]               unsigned
        step  = bound / (2^(bits-1) - 1),  range [-bound, bound]      signed
        value = step * round(clip(value) / step)

    The gradient is 1 inside the range and 0 outside (straight-through); where clipped, the bound gets the gradient
    (PACT; Choi et al., 2018, arXiv:1805.06085).

    Args:
        values: any shape.
        bits: at least 2.
        bound: scalar, positive.

    Raises:
        ValueError: fewer than two bits.
    """
    if bits < 2:
        raise ValueError(f"{bits} bits cannot hold a sign and a number: use 2 or more")
    steps = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    clipped = torch.minimum(torch.maximum(values, -bound if signed else torch.zeros_like(bound)), bound)
    step = bound.detach() / steps
    return clipped + (step * (clipped / step).round() - clipped).detach()


class Clip(nn.Module):
    """The learnable upper bound of activations that are quantised."""

    def __init__(self, start: float = 6.0):
        super().__init__()
        self.bound = nn.Parameter(torch.tensor(start))

    def forward(self, values: Tensor, bits: int) -> Tensor:
        """Activations from 0 on, rounded to `bits`."""
        return fake_quantise(values, bits, self.bound.clamp(min=1e-3), signed=False)


def quantised_weight(weight: Tensor, bits: int) -> Tensor:
    """A layer's weights rounded to `bits`, in the range of their largest magnitude."""
    return fake_quantise(weight, bits, weight.detach().abs().max().clamp(min=1e-8), signed=True)

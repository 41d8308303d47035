"""Arcs and tangents on spheres, for merges that average directions."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2**16
"""Entries whose products are made at once, and summed up in float32."""


def interpolated(first: Tensor, second: Tensor, t: float, parallel: float) -> Tensor:
    """From `first` at t = 0 to `second` at t = 1 along an arc, each row `(..., entries)` by an angle of its own.

    Args:
        parallel: cosine, of either sign, beyond which a row is interpolated on a line.
    """
    norms = [_inner(x, x).sqrt() for x in (first, second)]
    cosine = (_inner(first, second) / (norms[0] * norms[1]).clamp(min=1e-30)).clamp(-1, 1)
    line = (cosine.abs() > parallel) | (norms[0] == 0) | (norms[1] == 0)
    angle = torch.where(line, 1.0, cosine.arccos())
    a = torch.where(line, 1 - t, ((1 - t) * angle).sin() / angle.sin()).to(first.dtype)
    b = torch.where(line, t, (t * angle).sin() / angle.sin()).to(first.dtype)
    return (first * a).addcmul_(second, b)


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """Products of rows, `(..., 1)`, in float64: float32 is exact enough within a block, not over a whole embedding."""
    blocks = zip(first.split(BLOCK, dim=-1), second.split(BLOCK, dim=-1), strict=True)
    return torch.stack([(a * b).sum(dim=-1).double() for a, b in blocks]).sum(dim=0)[..., None]


def logarithm(at: Tensor, point: Tensor) -> Tensor:
    """The tangent at one unit vector that leads to another: its length is the angle between them."""
    cosine = (at @ point).clamp(-1, 1)
    angle = cosine.arccos()
    if float(angle) < 1e-7:
        return torch.zeros_like(at)
    return (point - cosine * at) * (angle / angle.sin())


def exponential(at: Tensor, tangent: Tensor) -> Tensor:
    """Where a tangent at a unit vector leads to on the sphere."""
    length = tangent.norm()
    if float(length) == 0:
        return at
    return at * length.cos() + tangent * (length.sin() / length)

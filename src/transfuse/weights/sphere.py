"""Arcs and tangents on spheres, for merges that average directions."""

from __future__ import annotations

import torch
from torch import Tensor


def interpolated(first: Tensor, second: Tensor, t: float, parallel: float) -> Tensor:
    """From `first` at t = 0 to `second` at t = 1 along an arc, each row `(..., entries)` by an angle of its own.

    Args:
        parallel: cosine, of either sign, beyond which a row is interpolated on a line.
    """
    norms = [x.norm(dim=-1, keepdim=True, dtype=torch.float64) for x in (first, second)]
    products = torch.einsum("...i,...i->...", first, second)[..., None].double()
    cosine = (products / (norms[0] * norms[1]).clamp(min=1e-30)).clamp(-1, 1)
    line = (cosine.abs() > parallel) | (norms[0] == 0) | (norms[1] == 0)
    angle = torch.where(line, 1.0, cosine.arccos())
    a = torch.where(line, 1 - t, ((1 - t) * angle).sin() / angle.sin()).to(first.dtype)
    b = torch.where(line, t, (t * angle).sin() / angle.sin()).to(first.dtype)
    return torch.addcmul(first * a, second, b)


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

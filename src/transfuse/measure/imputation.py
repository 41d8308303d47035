"""Take pixels out of pictures without leaving a trace of which: noisy linear imputation, as ROAD does it.

Rong et al., ICML 2022, arXiv:2202.00449. A pixel set to black tells a model where something was removed; one that
follows from its neighbours does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transfuse.core.errors import ShapeError

NOISE = 0.01


def impute(images: Tensor, kept: Tensor, noise: float = NOISE, iterations: int = 500) -> Tensor:
    """Every removed pixel becomes the weighted mean of its eight neighbours (known or removed alike), plus noise.

    Neighbours beside a pixel weigh twice as much as those across a corner; beyond the edge there are none. This is one
    linear system for each picture, symmetric and positive definite, solved by conjugate gradients for all at once.

    Args:
        images: `(samples, channels, height, width)`.
        kept: `(samples, height, width)` bool; removed where False.
        noise: standard deviation of Gaussian noise on what was filled in, from the global generator.
        iterations: the most that the solver takes; it stops when rounding is all that is left.

    Returns:
        As `images`; a picture of which nothing is kept stays as it is.

    Raises:
        ShapeError: `kept` is not about these pictures.
    """
    if images.dim() != 4 or kept.shape != images.shape[:1] + images.shape[2:]:
        raise ShapeError(f"{tuple(kept.shape)} does not say which pixels of {tuple(images.shape)} are kept")
    kept = kept | ~kept.flatten(1).any(dim=1)[:, None, None]
    hole = (~kept)[:, None].to(images.dtype)
    neighbours = _around(torch.ones_like(images[:1, :1]))

    def system(values: Tensor) -> Tensor:
        return hole * (neighbours * values - _around(values))

    solution = torch.zeros_like(images)
    residual = hole * _around(images * (1 - hole))
    direction, length = residual, _dot(residual, residual)
    smallest = 1e-12 * length.clamp(min=1e-12)
    for _ in range(iterations):
        if (length <= smallest).all():
            break
        image = system(direction)
        step = length / _dot(direction, image).clamp(min=1e-30)
        solution = solution + step * direction
        residual = residual - step * image
        new = _dot(residual, residual)
        direction = residual + new / length.clamp(min=1e-30) * direction
        length = new
    filled = solution + noise * torch.randn_like(images)
    return torch.where(kept[:, None], images, filled)


def _around(values: Tensor) -> Tensor:
    side, corner = 1 / 6, 1 / 12
    weights = torch.tensor([[corner, side, corner], [side, 0.0, side], [corner, side, corner]], dtype=values.dtype)
    channels = values.shape[1]
    kernel = weights.to(values.device).expand(channels, 1, 3, 3)
    return F.conv2d(values, kernel, padding=1, groups=channels)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(dim=(2, 3), keepdim=True)

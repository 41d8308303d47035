"""Changes to whole sets of pictures that make another domain of them: pure functions, `(samples, 1, height, width)`.

Values lie in [0, 1] before and after. Augmentation, which differs from epoch to epoch, is not here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from transfuse.core.errors import InputError


def rotated(images: Tensor, angle: float) -> Tensor:
    """Turned counter-clockwise by `angle` degrees about the middle, bilinear; what comes from outside is 0."""
    turn = math.radians(angle)
    height, width = images.shape[-2:]
    # Where a pixel comes from, in coordinates from -1 to 1 along each side: the sides may differ in length.
    inverse = torch.tensor(
        [
            [math.cos(turn), -math.sin(turn) * height / width, 0.0],
            [math.sin(turn) * width / height, math.cos(turn), 0.0],
        ]
    )
    grid = F.affine_grid(inverse.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).clamp(0, 1)


def shifted(images: Tensor, contrast: float = 1.0, brightness: float = 0.0) -> Tensor:
    """`contrast * (value - 1/2) + 1/2 + brightness`, cut to [0, 1]; a contrast below 0 gives negatives."""
    return (contrast * (images - 0.5) + 0.5 + brightness).clamp(0, 1)


def noisy(images: Tensor, deviation: float, seed: int = 0) -> Tensor:
    """Gaussian noise of this standard deviation added to every pixel, cut to [0, 1].

    Raises:
        InputError: `deviation` is negative.
    """
    if deviation < 0:
        raise InputError(f"the deviation of noise is 0 or more, found {deviation}")
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + deviation * noise).clamp(0, 1)


def edges(images: Tensor) -> Tensor:
    """Strength of edges: the length of the gradient that Sobel's two filters see, 1 at the steepest step edge."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    gradient = F.conv2d(padded, torch.stack([across, across.T]).unsqueeze(1))
    return gradient.norm(dim=1, keepdim=True).clamp(0, 1)


def smaller(images: Tensor, side: int) -> Tensor:
    """Averaged over squares of pixels so that `side` x `side` are left.

    Raises:
        InputError: `side` does not divide the height and width.
    """
    height, width = images.shape[-2:]
    if side < 1 or height != width or height % side:
        raise InputError(f"side must divide the {height}x{width} pixels of these pictures, found {side}")
    return F.avg_pool2d(images, height // side)

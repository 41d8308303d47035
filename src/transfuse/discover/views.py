"""Random views of a sample: what must not change its class."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SHIFT, CONTRAST, NOISE = 0.1, 0.4, 0.05
"""Shift as a part of the side, contrast as a part of 1, noise in standard deviations of the batch."""
SMALL = (0.4, 0.7)
"""The side of a small view, as a part of the whole."""


def view(inputs: Tensor, small: bool = False, mirror: bool = True) -> Tensor:
    """One random view of every sample of a batch.

    Images `(batch, channels, height, width)` are shifted, mirrored, changed in contrast and covered with noise; a
    small view is a random window of them, enlarged. Rows of numbers `(batch, features)` get noise alone.

    Args:
        inputs: a batch.
        small: look at a part of the image.
        mirror: whether images may be mirrored: letters may not.
    """
    noise = NOISE * inputs.std() * torch.randn_like(inputs)
    if inputs.dim() != 4:
        return inputs + noise
    size = len(inputs)
    zoom = torch.empty(size, device=inputs.device).uniform_(*SMALL) if small else torch.ones(size, device=inputs.device)
    reach = 2 * SHIFT if not small else 1 - zoom
    shift = (2 * torch.rand(2, size, device=inputs.device) - 1) * reach
    side = torch.where(torch.rand(size, device=inputs.device) < 0.5, -1.0 if mirror else 1.0, 1.0)
    frame = torch.zeros(size, 2, 3, device=inputs.device)
    frame[:, 0, 0], frame[:, 1, 1], frame[:, :, 2] = zoom * side, zoom, shift.T
    grid = F.affine_grid(frame, list(inputs.shape), align_corners=False)
    moved = F.grid_sample(inputs, grid, padding_mode="border", align_corners=False)
    contrast = 1 + CONTRAST * (2 * torch.rand(size, 1, 1, 1, device=inputs.device) - 1)
    middle = moved.mean((1, 2, 3), keepdim=True)
    return middle + contrast * (moved - middle) + noise

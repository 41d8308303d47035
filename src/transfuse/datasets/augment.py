"""Augmentations of images that draw from the generator they are given, so that a seed gives a view again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def crop_flip_erase(
    image: Tensor, generator: torch.Generator, pad: int = 2, flip: float = 0.5, erase: float = 0.25
) -> Tensor:
    """A crop of the padded image, perhaps mirrored, perhaps with a rectangle set to 0.

    Args:
        image: `(channels, height, width)`.
        generator: of everything that is drawn.
        pad: pixels on each side that the crop may move by.
        flip, erase: probabilities of mirroring, and of erasing a rectangle of up to half of each side.
    """
    _, height, width = image.shape
    drawn = torch.rand(8, generator=generator).tolist()
    top, left = int(drawn[0] * (2 * pad + 1)), int(drawn[1] * (2 * pad + 1))
    view = F.pad(image, (pad, pad, pad, pad))[:, top : top + height, left : left + width]
    if drawn[2] < flip:
        view = view.flip(-1)
    if drawn[3] < erase:
        tall, wide = 1 + int(drawn[4] * height / 2), 1 + int(drawn[5] * width / 2)
        y, x = int(drawn[6] * (height - tall + 1)), int(drawn[7] * (width - wide + 1))
        view = view.clone()
        view[:, y : y + tall, x : x + wide] = 0
    return view

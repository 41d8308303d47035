"""From the student's features to the shape of the teacher's.

Built from one real batch, trained with the method, saved in its checkpoints, and not part of what the user gets.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from transfuse.core.errors import ShapeError


class Projector(nn.Module):
    """Maps features `(batch, width)`, `(batch, tokens, width)` or `(batch, channels, height, width)` onto another's.

    Width and channels are mapped by a learned linear layer, which is left out where they agree; tokens and
    pixels are averaged or interpolated to the size at hand, so lengths may change from batch to batch.
    Maps become tokens row by row; tokens become a map when their number, without an extra first (class)
    token, is a square.

    Args:
        student, teacher: features of one real batch.

    Raises:
        ShapeError: one side has a spatial or token axis and the other has none, or the axes are unknown.
    """

    def __init__(self, student: Tensor, teacher: Tensor):
        super().__init__()
        kinds = (student.dim(), teacher.dim())
        if not set(kinds) <= {3, 4} and kinds != (2, 2):
            raise ShapeError(
                f"no projector from features {tuple(student.shape)} to {tuple(teacher.shape)}: both need to be "
                "(batch, width), or each (batch, tokens, width) or (batch, channels, height, width)"
            )
        self.kinds = kinds
        here, there = (t.shape[1] if t.dim() == 4 else t.shape[-1] for t in (student, teacher))
        self.width: nn.Module = nn.Identity()
        if here != there:
            self.width = nn.Conv2d(here, there, 1, bias=False) if kinds[1] == 4 else nn.Linear(here, there, bias=False)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The student's features in the shape of the teacher's."""
        if self.kinds[1] == 4:
            maps = student if self.kinds[0] == 4 else _as_map(student)
            return resize_map(self.width(maps), (teacher.shape[-2], teacher.shape[-1]))
        if self.kinds[1] == 3:
            tokens = student.flatten(2).transpose(1, 2) if self.kinds[0] == 4 else student
            return resize_tokens(self.width(tokens), teacher.shape[1])
        return self.width(student)


def _as_map(tokens: Tensor) -> Tensor:
    for skip in (0, 1):  # with a class token first, or without
        side = math.isqrt(tokens.shape[1] - skip)
        if side * side == tokens.shape[1] - skip:
            return tokens[:, skip:].transpose(1, 2).unflatten(2, (side, side))
    raise ShapeError(f"{tokens.shape[1]} tokens are no square, so they cannot be matched with a feature map")


def resize_map(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Feature maps `(batch, channels, height, width)` at another size: averaged down, or interpolated up."""
    if maps.shape[-2:] == size:
        return maps
    if maps.shape[-2] >= size[0] and maps.shape[-1] >= size[1]:
        return F.adaptive_avg_pool2d(maps, size)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def resize_tokens(tokens: Tensor, length: int) -> Tensor:
    """Token features `(batch, tokens, width)` at another length, interpolated."""
    if tokens.shape[1] == length:
        return tokens
    return F.interpolate(tokens.transpose(1, 2), size=length, mode="linear", align_corners=False).transpose(1, 2)

"""What every loss does to its inputs first: compare shapes, leave half precision. Private to `losses`."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision, as autocast gives it, becomes float32; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


def require_same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have equal shapes, found {tuple(student.shape)} (student) and "
            f"{tuple(teacher.shape)} (teacher): project or align one of them first"
        )

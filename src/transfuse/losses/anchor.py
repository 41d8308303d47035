"""Penalties on how far parameters have moved from an anchor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def anchor_penalty(
    values: Mapping[str, Tensor], anchors: Mapping[str, Tensor], importance: Mapping[str, Tensor]
) -> Tensor:
    """Half the weighted squared distance, `1/2 * sum importance * (value - anchor)**2`, a scalar.

    Args:
        values: parameters by name; gradients flow to them.
        anchors, importance: under the same names, in the same shapes.

    Raises:
        ValueError: names or shapes differ.

    >>> at = {"w": torch.tensor([1.0, 2.0])}
    >>> anchor_penalty({"w": torch.tensor([3.0, 2.0])}, at, {"w": torch.tensor([0.5, 9.0])})
    tensor(1.)
    """
    if not values.keys() == anchors.keys() == importance.keys():
        raise ValueError(f"need the same names, found {[*values]}, {[*anchors]} and {[*importance]}")
    total: list[Tensor] = []
    for name, value in values.items():
        shapes = {value.shape, anchors[name].shape, importance[name].shape}
        if len(shapes) > 1:
            raise ValueError(f"{name!r} needs one shape, found {sorted(map(tuple, shapes))}")
        total.append((importance[name] * (value - anchors[name]).pow(2)).sum())
    return 0.5 * torch.stack(total).sum()

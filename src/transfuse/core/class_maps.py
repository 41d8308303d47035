"""Where in the image a classifier sees each class: its head applied at every position of its last feature map.

A head that averages a map over its positions and then applies a linear layer gives the same logits as one that
applies the layer at every position, a 1x1 convolution, and averages afterwards. The second form has a map for every
class on the way. Asking for the tap `"class_maps"` reads it, `(batch, classes, height, width)`, from any model of
the first form, without changing the model: `maps.mean((2, 3)) + bias` are its logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.core.errors import LayerError
from transfuse.core.outputs import call, find_logits, modes_kept

CLASS_MAPS = "class_maps"


@dataclass(frozen=True)
class ClassMapHead:
    """The head of a model that classifies by the average of a feature map.

    Attributes:
        features: path of the module that gives the map `(batch, channels, height, width)`.
        linear: path of the linear layer that is applied to its average.
    """

    features: str
    linear: str


def class_maps(features: Tensor, weight: Tensor) -> Tensor:
    """Apply a linear layer at every position: `(batch, channels, h, w)` and `(classes, channels)` to class maps.

    The bias belongs to the logits, after averaging: a share of it at every position would say where no class is.
    """
    return F.conv2d(features, weight[:, :, None, None])


@torch.no_grad()
def find_class_map_head(model: nn.Module, inputs: Any) -> ClassMapHead:
    """Find the head by running one batch: the last linear layer, and the map whose average is its input.

    Of several such maps, the largest is taken, and of equal ones the last.

    Raises:
        LayerError: the logits do not come from a linear layer, or its input is no module's averaged output.
    """
    seen = _Seen()
    handles = [m.register_forward_hook(seen.hook(name)) for name, m in model.named_modules() if name]
    try:
        with modes_kept(model):
            logits = find_logits(call(model.eval(), inputs))
    finally:
        for handle in handles:
            handle.remove()
    head = [(name, pooled) for name, pooled, output in seen.linear if _equal(output, logits)]
    if not head:
        raise LayerError(f"{type(model).__name__} has no class maps: its logits are not the output of a linear layer")
    linear, pooled = head[-1]
    fits = [(area, name) for area, name, mean in seen.maps if _equal(mean, pooled)]
    if not fits:
        raise LayerError(
            f"{type(model).__name__} has no class maps: the input of its head {linear!r} is not the average over "
            "positions of any module's output (batch, channels, height, width). The head must be global average "
            "pooling and one linear layer; an activation in between must be a module, such as nn.ReLU()"
        )
    largest = max(area for area, _ in fits)
    return ClassMapHead([name for area, name in fits if area == largest][-1], linear)


@dataclass
class _Seen:
    """What the modules of a model gave in one forward pass, in order."""

    linear: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    maps: list[tuple[int, str, Tensor]] = field(default_factory=list)

    def hook(self, name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, nn.Linear) and args:
                self.linear.append((name, args[0], output))
            elif isinstance(output, Tensor) and output.dim() == 4:
                # Averaged at once: a later module may write into it.
                self.maps.append((output[0, 0].numel(), name, output.mean((2, 3))))

        return note


def _equal(one: Tensor, other: Tensor) -> bool:
    """Up to rounding in another order of summation."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))

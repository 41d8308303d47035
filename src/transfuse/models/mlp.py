"""A multi-layer perceptron."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn


class MLP(nn.Sequential):
    """Fully connected layers with ReLU between them: `flatten`, `linear1`, `relu1`, ..., `fc`.

    Args:
        inputs: numbers per sample, whatever their shape: `(batch, ...)` is flattened to `(batch, inputs)`.
        hidden: widths of the hidden layers; empty for a linear classifier.
        classes: width of the output, `(batch, classes)`.
    """

    def __init__(self, inputs: int = 64, hidden: Sequence[int] = (64,), classes: int = 10):
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        widths = [inputs, *hidden]
        for i, (before, after) in enumerate(pairwise(widths), start=1):
            layers[f"linear{i}"] = nn.Linear(before, after)
            layers[f"relu{i}"] = nn.ReLU()
        layers["fc"] = nn.Linear(widths[-1], classes)
        super().__init__(layers)

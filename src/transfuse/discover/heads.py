"""Heads made of unit prototypes, and the model that is deployed with them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.core.outputs import call, find_logits
from transfuse.losses.clustering import cosine_logits


class Prototypes(nn.Module):
    """Unit vectors, one per class; the logits are cosines. `normalise` is called after every step.

    Args:
        width: of the features.
        classes: how many.
    """

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(classes, width), dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """`(samples, width)` to cosines `(samples, classes)`."""
        return cosine_logits(features, self.weight)

    @torch.no_grad()
    def normalise(self) -> None:
        """Bring every prototype back to length 1."""
        self.weight.copy_(F.normalize(self.weight, dim=1))


class NovelHead(nn.Module):
    """A projector with one hidden layer, and prototypes of the novel classes behind it."""

    def __init__(self, features: int, hidden: int, width: int, classes: int):
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.prototypes = Prototypes(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        """`(samples, features)` to cosines `(samples, classes)`."""
        return self.prototypes(self.projector(features))


class DiscoveredModel(nn.Module):
    """What is deployed: a body, the head of the known classes and one of the novel ones, side by side.

    `forward(inputs)` gives logits `(batch, known + novel)`; `logits[:, known:]` is the answer where a sample is known
    to be of a novel class.
    """

    def __init__(self, body: nn.Module, known: nn.Module, novel: nn.Module, tau: float):
        super().__init__()
        self.body, self.tau = body, tau
        self.known, self.novel = copy.deepcopy(known), copy.deepcopy(novel)

    def forward(self, inputs: Any = None, **named: Any) -> Tensor:
        """Logits of all classes."""
        features = find_logits(call(self.body, named if inputs is None else inputs))
        return torch.cat([self.known(features), self.novel(features)], 1) / self.tau

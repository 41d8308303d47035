"""Side networks that tell domains apart, the features they look at, and what they say about a prediction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transfuse.core.outputs import Outputs


def discriminator(width: int, hidden: int, outputs: int = 1) -> nn.Sequential:
    """A perceptron with two hidden layers, from features `(batch, width)` to logits `(batch, outputs)`."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


def flat(outputs: Outputs, layer: str) -> Tensor:
    """A layer's features as `(batch, width)`."""
    features: Tensor = outputs.features[layer]
    return features.flatten(1)


class ClassDomains(nn.ModuleList):
    """A discriminator per class: from features `(batch, width)` to logits `(batch, classes, 2)` of the two domains."""

    def __init__(self, width: int, hidden: int, classes: int):
        super().__init__(discriminator(width, hidden, 2) for _ in range(classes))

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([of_class(features) for of_class in self], dim=1)


def refined(logits: Tensor, class_domains: Tensor, multiply_logits: bool = False) -> Tensor:
    """Logits of p(k | x, target), by Bayes' rule from p(k | x) and P(target | x, k).

    Args:
        logits: of the classes, `(batch, classes)`.
        class_domains: logits of each class's discriminator, `(batch, classes, 2)`; no gradient flows into them.
        multiply_logits: multiply logits by the probability of the target domain, which is not Bayes' rule.

    Returns:
        `(batch, classes)`: logarithms of normalised probabilities, except with `multiply_logits`.
    """
    target = class_domains.detach().log_softmax(2)[..., 1]
    return logits * target.exp() if multiply_logits else (logits + target).log_softmax(1)

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


class ClassDomains(nn.Module):
    """A discriminator per class: from features `(batch, width)` to logits `(batch, classes, 2)` of the two domains.

    Each is a perceptron like that of :func:`discriminator`; all are computed at once.
    """

    def __init__(self, width: int, hidden: int, classes: int):
        super().__init__()
        sizes = ((width, hidden), (hidden, hidden), (hidden, 2))
        self.classes = classes
        self.weights = nn.ParameterList(_uniform(classes, i, o, inputs=i) for i, o in sizes)
        self.biases = nn.ParameterList(_uniform(classes, 1, o, inputs=i) for i, o in sizes)

    def forward(self, features: Tensor) -> Tensor:
        values = features.expand(self.classes, *features.shape)
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            values = torch.baddbmm(bias, values if number == 0 else values.relu(), weight)
        return values.transpose(0, 1)


def _uniform(*shape: int, inputs: int) -> nn.Parameter:
    """Initial values as in :class:`torch.nn.Linear`."""
    return nn.Parameter(torch.empty(shape).uniform_(-(inputs**-0.5), inputs**-0.5))


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

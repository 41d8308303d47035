"""The side network that tells domains apart, and the features it looks at."""

from __future__ import annotations

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

"""A projection onto the unit sphere, and a linear classifier on it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SphereClassifier(nn.Module):
    """Features of length 1 in a space that domains of different dimensions can share, and a linear head `fc`.

        z = normalise(LeakyReLU(project(normalise(x)))),   logits = fc(z)

    It is the network of KTF (Yao et al., 2025, arXiv:2502.13573): weights and biases start from a normal
    distribution of deviation 0.01, cut at two deviations.

    Args:
        inputs: numbers per sample, whatever their shape: `(batch, ...)` is flattened to `(batch, inputs)`.
        width: dimensions of the shared space.
        classes: width of the output, `(batch, classes)`.
    """

    def __init__(self, inputs: int = 64, width: int = 256, classes: int = 10):
        super().__init__()
        self.project, self.fc = nn.Linear(inputs, width), nn.Linear(width, classes)
        for p in self.parameters():
            nn.init.trunc_normal_(p, std=0.01, a=-0.02, b=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(x.flatten(1))
        return self.fc(F.normalize(F.leaky_relu(self.project(x), 0.2)))

"""A small convolutional network for small images."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three convolution blocks `layer1`..`layer3`, halving the image between them, and a linear head `fc`.

    Fully convolutional up to a global average, so any image from 4x4 pixels on will do.

    Args:
        channels: channels of the images `(batch, channels, height, width)`.
        width: channels of `layer1`; `layer2` and `layer3` have twice and four times as many.
        classes: width of the output, `(batch, classes)`.
    """

    def __init__(self, channels: int = 1, width: int = 16, classes: int = 10):
        super().__init__()
        self.layer1 = convolution(channels, width)
        self.layer2 = convolution(width, 2 * width)
        self.layer3 = convolution(2 * width, 4 * width)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer1(images)
        x = self.layer2(self.pool(x))
        x = self.layer3(self.pool(x))
        return self.fc(x.mean(dim=(2, 3)))


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """3x3 convolution, batch normalisation, ReLU; the image keeps its size."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
            bn=nn.BatchNorm2d(outputs),
            relu=nn.ReLU(),
        )
    )

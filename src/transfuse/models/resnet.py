"""Residual networks for small images, as He et al. built them for CIFAR-10."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from transfuse.core.errors import InputError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A of the paper).

    Where the block halves the image and widens the channels, the shortcut takes every other pixel and
    pads the new channels with zeros.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = convolution(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    """ResNet for small images: `conv1`, `bn1`, stages `layer1`..`layer3`, global average, `fc`.

    (He et al., CVPR 2016, arXiv:1512.03385, section 4.2.) The stages have `width`, `2 * width` and
    `4 * width` channels; each has `(depth - 2) / 6` blocks. Depth 20 at the defaults: 269,722 parameters.

    Args:
        depth: number of layers with weights, `6n + 2`: 8, 14, 20, 32, 44, 56, ...
        channels: channels of the images `(batch, channels, height, width)`.
        classes: width of the output, `(batch, classes)`.
        width: channels of the first stage.

    Raises:
        InputError: `depth` is not `6n + 2`.
    """

    def __init__(self, depth: int = 20, channels: int = 3, classes: int = 10, width: int = 16):
        if depth < 8 or depth % 6 != 2:
            raise InputError(f"the depth of a small-image ResNet is 6n + 2 (8, 14, 20, ...), found {depth}")
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = convolution(channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = stage(width, width, blocks, stride=1)
        self.layer2 = stage(width, 2 * width, blocks, stride=2)
        self.layer3 = stage(2 * width, 4 * width, blocks, stride=2)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias (batch normalisation follows), initialised for ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    """Blocks at one resolution; only the first changes size and channels."""
    rest = [BasicBlock(outputs, outputs, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


def resnet8(channels: int = 3, classes: int = 10, width: int = 16) -> ResNet:
    """:class:`ResNet` of depth 8: one block per stage, 75,290 parameters at the defaults."""
    return ResNet(8, channels, classes, width)


def resnet20(channels: int = 3, classes: int = 10, width: int = 16) -> ResNet:
    """:class:`ResNet` of depth 20: three blocks per stage, 269,722 parameters at the defaults."""
    return ResNet(20, channels, classes, width)

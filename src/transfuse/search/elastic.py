"""ElasticNet: one network that holds every network of a space in its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.core.errors import InputError
from transfuse.core.quantization import Clip, quantised_weight
from transfuse.search.space import Space, Spec


class ElasticNet(nn.Module):
    """A small MobileNet-like classifier whose blocks have elastic kernels, widths, depth and bits.

    Stem, then blocks of: pointwise (expand), depthwise, pointwise (project), each with batch normalisation, and a
    shortcut around; then the mean over positions and a linear head. A sub-network uses the first channels, the middle
    of the kernels and the first blocks. `with net.using(spec):` runs it as that network.

    Args:
        classes, channels: of outputs and input images.
        stem: channels between blocks.
        blocks, kernels, widths, depths, bits: the :class:`Space`; widths are the channels inside a block.
    """

    def __init__(
        self,
        classes: int = 10,
        channels: int = 1,
        stem: int = 16,
        blocks: int = 4,
        kernels: tuple[int, ...] = (3, 5),
        widths: tuple[int, ...] = (16, 32, 48, 64),
        depths: tuple[int, ...] = (2, 3, 4),
        bits: tuple[int, ...] = (2, 4, 8),
    ):
        super().__init__()
        self.space = Space(blocks, tuple(kernels), tuple(widths), tuple(depths), tuple(bits))
        self.stem = nn.Sequential(nn.Conv2d(channels, stem, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(stem))
        self.blocks = nn.ModuleList(Block(stem, widths[-1], kernels[-1]) for _ in range(blocks))
        self.fc = nn.Linear(stem, classes)
        self._spec = self.space.largest()

    @property
    def spec(self) -> Spec:
        """The network that it runs as."""
        return self._spec

    @contextmanager
    def using(self, spec: Spec) -> Iterator[None]:
        """Run as a network of the space."""
        before, self._spec = self._spec, spec
        try:
            yield
        finally:
            self._spec = before

    def forward(self, images: Tensor) -> Tensor:
        """`(batch, channels, height, width)` to logits `(batch, classes)`."""
        spec, x = self._spec, F.relu(self.stem(images))
        for i in range(spec.depth):
            x = self.blocks[i](x, spec.kernels[i], spec.widths[i], spec.bits and spec.bits[i])
        return self.fc(x.mean((2, 3)))

    def cost(self, spec: Spec) -> float:
        """Bit operations of the blocks in use, per position: multiplications times bits of weight and activation.

        A network in full precision counts 8 bits.
        """
        stem, total = self.fc.in_features, 0.0
        for i in range(spec.depth):
            w, a, dw, da = spec.bits[i] if spec.bits else (8,) * 4
            total += 2 * stem * spec.widths[i] * w * a + spec.kernels[i] ** 2 * spec.widths[i] * dw * da
        return total

    @torch.no_grad()
    def extract(self, spec: Spec) -> ElasticNet:
        """An independent network of exactly that size, with the weights copied.

        Raises:
            InputError: it is not of this space.
        """
        self.space.encode(spec)
        own = spec.kernels[: spec.depth], spec.widths[: spec.depth]
        small = ElasticNet(
            self.fc.out_features,
            self.stem[0].in_channels,  # type: ignore[arg-type]
            self.fc.in_features,
            spec.depth,
            (max(own[0]),),
            (max(own[1]),),
            (spec.depth,),
            self.space.bits,
        ).to(self.fc.weight)
        kernels, widths = (tuple(sorted(set(o))) for o in own)
        small.space = Space(spec.depth, kernels, widths, (spec.depth,), self.space.bits)
        small.stem.load_state_dict(self.stem.state_dict())
        small.fc.load_state_dict(self.fc.state_dict())
        for i, (kernel, width) in enumerate(zip(*own, strict=True)):
            block, whole = Block(self.fc.in_features, width, kernel).to(self.fc.weight), self.blocks[i]
            assert isinstance(whole, Block)
            block.take(whole)
            small.blocks[i] = block
        small._spec = Spec(spec.depth, *own, None if spec.bits is None else spec.bits[: spec.depth])
        return small


class Block(nn.Module):
    """Expand, depthwise, project, with a shortcut; weights of the largest block, of which slices are used."""

    def __init__(self, stem: int, width: int, kernel: int):
        super().__init__()
        self.expand = nn.Conv2d(stem, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.project = nn.Conv2d(width, stem, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(stem)
        self.clips = nn.ModuleList(Clip() for _ in range(3))

    def forward(self, x: Tensor, kernel: int, width: int, bits: tuple[int, ...] | None) -> Tensor:
        """`(batch, stem, height, width)` to the same shape. Both pointwise layers have the same bits."""
        shortcut = x
        trim = (self.depthwise.kernel_size[0] - kernel) // 2
        middle = slice(trim, trim + kernel)
        weights = [
            self.expand.weight[:width],
            self.depthwise.weight[:width, :, middle, middle],
            self.project.weight[:, :width],
        ]
        if bits is not None:
            own = (bits[0], bits[2], bits[0])
            weights = [quantised_weight(w, b) for w, b in zip(weights, own, strict=True)]
            x = self.clips[0](x, bits[1])
        y = F.relu(_norm(self.norm1, F.conv2d(x, weights[0]), width))
        if bits is not None:
            y = self.clips[1](y, bits[3])
        y = F.relu(_norm(self.norm2, F.conv2d(y, weights[1], padding=kernel // 2, groups=width), width))
        if bits is not None:
            y = self.clips[2](y, bits[1])
        return F.relu(shortcut + _norm(self.norm3, F.conv2d(y, weights[2]), len(self.norm3.weight)))

    @torch.no_grad()
    def take(self, other: Block) -> None:
        """Copy the slices of a larger block that this one's sizes use."""
        width, kernel = self.depthwise.out_channels, self.depthwise.kernel_size[0]
        trim = (other.depthwise.kernel_size[0] - kernel) // 2
        middle = slice(trim, trim + kernel)
        self.expand.weight.copy_(other.expand.weight[:width])
        self.depthwise.weight.copy_(other.depthwise.weight[:width, :, middle, middle])
        self.project.weight.copy_(other.project.weight[:, :width])
        for mine, theirs in ((self.norm1, other.norm1), (self.norm2, other.norm2), (self.norm3, other.norm3)):
            for name, tensor in mine.state_dict().items():
                full = theirs.state_dict()[name]
                tensor.copy_(full[: len(tensor)] if tensor.dim() else full)
        self.clips.load_state_dict(other.clips.state_dict())


def _norm(norm: nn.BatchNorm2d, x: Tensor, width: int) -> Tensor:
    """Batch normalisation of the first channels, with their part of the running statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean[:width], norm.running_var[:width]
    momentum = norm.momentum
    if norm.training and momentum is None:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += 1
        momentum = 1.0 / float(norm.num_batches_tracked)
    return F.batch_norm(x, mean, var, norm.weight[:width], norm.bias[:width], norm.training, momentum or 0.0, norm.eps)


@torch.no_grad()
def recalibrate(net: ElasticNet, batches: list[Tensor]) -> None:
    """Estimate the running statistics anew for the network in use: those of others do not fit it.

    Args:
        batches: of images; the statistics become their mean.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms or not batches:
        raise InputError("nothing to recalibrate: no batch normalisation, or no batches")
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    mode = net.training
    net.train()
    for images in batches:
        net(images)
    net.train(mode)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum

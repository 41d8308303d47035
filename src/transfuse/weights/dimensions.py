"""Networks for images and networks for volumes: layers of one for those of the other, and weights carried across."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.core.errors import InputError, LayerError
from transfuse.core.watch import TransferWarning
from transfuse.losses.kernels import fourier_shift, in_planes, inflated, turned_plane

Steer = Literal["shift", "rotate"]
Kernels = Literal["cross", "inflate", "acs"]
STEERS = ("shift", "rotate")
KERNELS = ("cross", "inflate", "acs")
CHUNK = 64
"""Samples whose kernels are in memory at once."""


class CrossDConv2d(nn.Module):
    """A convolution of images whose kernels are planes of three-dimensional ones, chosen by each image.

        rho = Conv1x1(ReLU(BN(Conv1x1(x))))          4 channels
        v_c = sum_p softmax_p(rho_c) * rho_c(p)      k = v[:3] / |v[:3]|,  theta = pi/4 * tanh(v[3])
        shift:   U' = U moved by 1 - theta * (k x 1)       rotate:  U' = U turned about k by theta
        kernel = the middle plane of U' along its first axis

    The paper multiplies the spectrum of U by phases of frequencies that were turned by I + theta [k]_x. That turns
    nothing: the phases depend on the sum of the turned frequencies alone, so U is moved, and by a whole voxel along
    every axis where theta is 0. `shift` does exactly this; `rotate` does what the words say, and is not the paper's.

    Args:
        inputs, outputs, size, stride, padding, dilation, groups, bias: as of :class:`torch.nn.Conv2d`, square.
        steer: `"shift"` or `"rotate"`.
        centred: leave the whole voxel out of the shift.

    Raises:
        InputError: a size below 2, an unknown steer, or one that cannot be centred.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        steer: Steer = "shift",
        centred: bool = False,
    ):
        super().__init__()
        require_steer("CrossDConv2d", steer, centred)
        if size < 2:
            raise InputError(f"CrossDConv2d: size is {size}: a single voxel cannot be moved, use an ordinary Conv2d")
        if size % 2 == 0:
            message = f"a kernel of even size, {size}, loses a part of its norm when it is moved: take an odd size"
            warnings.warn(message, TransferWarning, stacklevel=2)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.steer, self.centred = steer, centred
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, size, size, size))
        nn.init.kaiming_normal_(self.weight, mode="fan_out")
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.steering = nn.Sequential(nn.Conv2d(inputs, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1))

    def direction(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The axis k `(batch, 3)` and the angle theta `(batch,)` of every image."""
        rho = self.steering(images).flatten(2)
        v = (rho.softmax(-1) * rho).sum(-1)
        return v[:, :3] / (v[:, :3].norm(dim=1, keepdim=True) + 1e-8), math.pi / 4 * v[:, 3].tanh()

    def kernels(self, axis: Tensor, angle: Tensor) -> Tensor:
        """The kernels of every image, `(batch, outputs, inputs / groups, size, size)`."""
        plane = self.weight.shape[-1] // 2
        if self.steer == "rotate":
            return turned_plane(self.weight, axis, angle, plane)
        ones = torch.ones_like(axis)
        shift = -angle[:, None] * torch.linalg.cross(axis, ones)
        return fourier_shift(self.weight, shift if self.centred else ones + shift, plane)

    def forward(self, images: Tensor) -> Tensor:
        steering = self.direction(images)
        parts = zip(images.split(CHUNK), *(s.split(CHUNK) for s in steering), strict=True)
        answer = torch.cat([self._convolved(part, self.kernels(axis, angle)) for part, axis, angle in parts])
        return answer if self.bias is None else answer + self.bias[:, None, None]

    def _convolved(self, images: Tensor, kernels: Tensor) -> Tensor:
        """Every image with its own kernels: one convolution, in which the images are groups."""
        batch, outputs = kernels.shape[:2]
        answer = F.conv2d(
            images.reshape(1, -1, *images.shape[2:]),
            kernels.flatten(0, 1).to(images.dtype),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=batch * self.groups,
        )
        return answer.view(batch, outputs, *answer.shape[2:])


def require_steer(name: str, steer: str, centred: bool) -> None:
    """Raises: InputError: an unknown way to steer, or a rotation that shall be centred."""
    if steer not in STEERS:
        raise InputError(f"{name}: steer is {steer!r}, it must be one of {', '.join(STEERS)}")
    if centred and steer == "rotate":
        raise InputError(f"{name}: a kernel that is turned is not moved, so there is nothing to centre: steer='shift'")


def flattened(model: nn.Module, kernels: Kernels = "cross", steer: Steer = "shift", centred: bool = False) -> nn.Module:
    """A network for images in the shape of one for volumes, with the same names, its convolutions drawn anew.

    Convolutions become :class:`CrossDConv2d`, of one voxel or with other kernels than `"cross"` ordinary ones; batch
    normalisation, pooling and dropout become those of images. What treats the last dimensions alike, whatever their
    number, stays.

    Raises:
        LayerError: a layer that has no counterpart, or is not the same along all axes.
    """

    def conv(path: str, old: nn.Conv3d) -> nn.Module:
        given = _geometry(path, old)
        if kernels == "cross" and given["kernel_size"] > 1:
            if old.padding_mode != "zeros":
                raise LayerError(f"{path!r} pads with {old.padding_mode!r}: CrossDConv2d knows zeros alone")
            size = given.pop("kernel_size")
            del given["padding_mode"]
            return CrossDConv2d(old.in_channels, old.out_channels, size, **given, steer=steer, centred=centred)
        return nn.Conv2d(old.in_channels, old.out_channels, **given)

    return _replaced(model, "3d", "2d", conv)


def raised(model: nn.Module) -> nn.Module:
    """A network for volumes in the shape of one for images, with the same names, its convolutions drawn anew.

    Raises:
        LayerError: a layer that has no counterpart, or is not the same along all axes.
    """

    def conv(path: str, old: nn.Module) -> nn.Module:
        if isinstance(old, CrossDConv2d):
            given = {"stride": old.stride, "padding": old.padding, "dilation": old.dilation, "groups": old.groups}
            given = {name: _edge(path, name, value) for name, value in given.items()}
            outputs, inputs, size = old.weight.shape[:3]
            return nn.Conv3d(inputs * old.groups, outputs, size, **given, bias=old.bias is not None)
        assert isinstance(old, nn.Conv2d)
        return nn.Conv3d(old.in_channels, old.out_channels, **_geometry(path, old))

    return _replaced(model, "2d", "3d", conv)


@torch.no_grad()
def carry(source: nn.Module, target: nn.Module, kernels: Kernels = "cross", skip: Collection[str] = ()) -> None:
    """Copy weights and statistics into a network of the same names and another number of dimensions, in place.

    Kernels of :class:`CrossDConv2d` and of :class:`torch.nn.Conv3d` are the same, so they are copied either way; those
    of ordinary convolutions of images are inflated or laid into planes. Steering has no counterpart, and stays.

    Args:
        skip: paths of layers that stay as they are, a new head's for instance.

    Raises:
        LayerError: a layer of one side that the other has not, or of another shape; nothing has been copied then.
    """
    here, there = (_layers(model, skip) for model in (target, source))
    if alone := sorted(here.keys() ^ there.keys()):
        raise LayerError(
            f"{len(alone)} layers are on one side alone: {', '.join(map(repr, alone[:6]))}. Build one network from the "
            "other with flattened() or raised(), or name in skip what is to stay"
        )
    found: list[tuple[Tensor, Tensor]] = []
    for path, layer in here.items():
        mine, theirs = (dict(_own(m)) for m in (layer, there[path]))
        for name, own in mine.items():
            value = theirs.get(name)
            if value is not None and (value.dim(), own.dim()) == (4, 5):
                value = _lifted(path, value, own.shape[-1], kernels)
            elif value is not None and (value.dim(), own.dim()) == (5, 4) and value.shape[-1] == 1:
                value = value.squeeze(2)
            if value is None or value.shape != own.shape:
                shape = None if value is None else tuple(value.shape)
                raise LayerError(f"{path}.{name} is {tuple(own.shape)} in the target, {shape} in the source")
            found.append((own, value))
    for own, value in found:
        own.copy_(value)


def plane_masks(model: nn.Module) -> dict[Tensor, Tensor]:
    """Where the kernels of an ACS network may differ from zero: every other entry stays zero."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv3d) and m.weight.shape[-1] > 1]
    return {m.weight: in_planes(torch.ones_like(m.weight[:, :, 0]), m.weight.shape[-1]) for m in layers}


def _lifted(path: str, kernel: Tensor, size: int, kernels: Kernels) -> Tensor:
    if size == 1:
        return kernel.unsqueeze(2)
    if kernels == "cross":
        raise LayerError(f"{path!r} is an ordinary convolution of images: say kernels='inflate' or 'acs'")
    return (inflated if kernels == "inflate" else in_planes)(kernel, size)


def _layers(model: nn.Module, skip: Collection[str]) -> dict[str, nn.Module]:
    """The layers with tensors of their own, but for steering."""
    steering, named = _steering(model), model.named_modules()
    return {path: m for path, m in named if _own(m) and path not in skip and not path.startswith(steering)}


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _replaced(model: nn.Module, old: str, new: str, conv: Callable[[str, Any], nn.Module]) -> nn.Module:
    """A copy with layers whose type ends with `old` replaced by those that end with `new`."""
    copied = copy.deepcopy(model)
    steering = _steering(model)
    for path, layer in list(copied.named_modules()):
        kind = type(layer).__name__
        if not kind.endswith(old) or path.startswith(steering):
            continue
        made = conv(path, layer) if kind in (f"Conv{old}", "CrossDConv2d") else _counterpart(path, layer, old, new)
        if not path:  # the model is this layer
            return made
        parent, _, name = path.rpartition(".")
        setattr(copied.get_submodule(parent), name, made)
    return copied


def _steering(model: nn.Module) -> tuple[str, ...]:
    """Where the steering of moved kernels is, which has no counterpart in other dimensions."""
    return tuple(f"{path}.steering" for path, m in model.named_modules() if isinstance(m, CrossDConv2d))


SETTINGS = {
    "BatchNorm": ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    "MaxPool": ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"),
    "AvgPool": ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    "AdaptiveAvgPool": ("output_size",),
    "AdaptiveMaxPool": ("output_size",),
    "Dropout": ("p",),
}
"""What the layers that have a counterpart are built from, by their name without the dimension."""


def _counterpart(path: str, layer: Any, old: str, new: str) -> nn.Module:
    name = type(layer).__name__.removesuffix(old)
    if name not in SETTINGS:
        known = ", ".join(f"{n}{old}" for n in ("Conv", *SETTINGS))
        raise LayerError(
            f"{path!r} is a {type(layer).__name__}, which has no counterpart here; there is one for {known}"
        )
    given = {s: _edge(path, s, getattr(layer, s)) for s in SETTINGS[name]}
    return cast(nn.Module, getattr(nn, name + new)(**given))


def _geometry(path: str, conv: nn.Conv2d | nn.Conv3d) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: _edge(path, name, getattr(conv, name)) for name in names} | {"bias": conv.bias is not None}


def _edge(path: str, name: str, value: Any) -> Any:
    """The one number of a setting that is the same along all axes."""
    if not isinstance(value, tuple):
        return value
    if len(set(value)) > 1:
        raise LayerError(f"{name} of {path!r} is {value}: it must be the same along all axes")
    return value[0]

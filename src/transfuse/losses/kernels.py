"""Convolution kernels of two and three dimensions: moved, turned, and made of each other.

Three-dimensional kernels are `(out, in, size, size, size)`, two-dimensional ones `(out, in, size, size)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def fourier_shift(kernel: Tensor, shift: Tensor, plane: int | None = None) -> Tensor:
    """Move a kernel cyclically by a part of a voxel, for every sample by its own shift.

        moved = Re IFFT3(exp(-2 pi i f . shift) * FFT3(kernel))          f = fftfreq(size) on each axis

    The phase is a product over axes, so each axis has a matrix of its own, `IFFT diag(phase) FFT`, which is what is
    applied: no spectrum is built. Odd sizes keep the kernel's norm; of even ones a part becomes imaginary and is lost.

    Args:
        kernel: three-dimensional.
        shift: `(batch, 3)`, in voxels.
        plane: only this plane along the first axis.

    Returns:
        `(batch, out, in, size, size, size)`, or without the first `size` for a plane.
    """
    size = kernel.shape[-1]
    place, frequency = torch.arange(size, device=shift.device), torch.fft.fftfreq(size, device=shift.device)
    lag = place[:, None] - place - shift[..., None, None]
    angle = 2 * math.pi * lag[..., None] * frequency
    matrix = torch.polar(torch.ones_like(angle), angle).mean(-1)  # (batch, axis, size, size)
    if size % 2:  # for each frequency there is its negative, so nothing is imaginary
        matrix = matrix.real
    rows = matrix[:, 0] if plane is None else matrix[:, 0, plane : plane + 1]
    moved = torch.einsum("bzd,oidhw->boizhw", rows, kernel.to(matrix.dtype))
    moved = torch.einsum("byh,boizhw->boizyw", matrix[:, 1], moved)
    moved = torch.einsum("bxw,boizyw->boizyx", matrix[:, 2], moved)
    moved = moved.real if moved.is_complex() else moved
    return moved if plane is None else moved.squeeze(3)


def turned_plane(kernel: Tensor, axis: Tensor, angle: Tensor, plane: int) -> Tensor:
    """One plane along the first axis of a kernel that was turned about its middle, by linear interpolation.

    Args:
        kernel: three-dimensional.
        axis, angle: `(batch, 3)` unit vectors and `(batch,)` radians, for every sample its own.

    Returns:
        `(batch, out, in, size, size)`.
    """
    out, channels, size = kernel.shape[:3]
    k = cross_matrix(axis)
    sine, cosine = angle.sin()[:, None, None], angle.cos()[:, None, None]
    back = torch.eye(3, dtype=k.dtype, device=k.device) - sine * k + (1 - cosine) * k @ k  # by the opposite angle
    side = torch.linspace(-1, 1, size, dtype=k.dtype, device=k.device)
    there = torch.stack(torch.meshgrid(side[plane : plane + 1], side, side, indexing="ij"), -1)
    grid = torch.einsum("bij,dhwj->bdhwi", back, there).flip(-1)  # grid_sample counts axes from the last one
    whole = kernel.reshape(1, out * channels, size, size, size).expand(len(axis), -1, -1, -1, -1)
    return F.grid_sample(whole, grid, align_corners=True).view(-1, out, channels, size, size)


def cross_matrix(axis: Tensor) -> Tensor:
    """The matrices K with K v = axis x v, `(batch, 3, 3)`."""
    eye = torch.eye(3, dtype=axis.dtype, device=axis.device)
    return torch.linalg.cross(axis[:, None, :].expand(-1, 3, -1), eye.expand(len(axis), -1, -1)).mT


def inflated(kernel: Tensor, size: int) -> Tensor:
    """A two-dimensional kernel repeated along depth and divided by it: what is constant in depth it answers alike."""
    return kernel.unsqueeze(2).repeat(1, 1, size, 1, 1) / size


def in_planes(kernel: Tensor, size: int) -> Tensor:
    """A two-dimensional kernel for volumes: a third of its outputs lies in each of the three planes, zeros elsewhere.

    The rest of the division goes to the last third. (ACS convolutions: Yang et al., 2021, arXiv:1911.10477.)
    """
    out, channels = kernel.shape[:2]
    third, middle = out // 3, size // 2
    whole = kernel.new_zeros(out, channels, size, size, size)
    whole[:third, :, middle] = kernel[:third]
    whole[third : 2 * third, :, :, middle] = kernel[third : 2 * third]
    whole[2 * third :, :, :, :, middle] = kernel[2 * third :]
    return whole

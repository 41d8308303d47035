"""What a model costs to keep and to run: parameters, bytes, floating point operations, time.

The only measure that runs a model. It leaves the model as it was: mode, parameters, buffers, and the
random state of torch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from transfuse.core.errors import InputError
from transfuse.core.outputs import call, eager

_WARM_UP = 2
_FIRST = torch.zeros(1, dtype=torch.int64)
"""The task that a model of several is measured on."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model costs.

    Args:
        parameters: numbers in parameters; a shared parameter counts once.
        trainable: those of them that require a gradient.
        bytes: size of parameters and buffers in memory; tied tensors count once.
        flops: floating point operations of one forward pass, per sample; None where they cannot be counted.
        latency_ms: median milliseconds of one forward pass of the whole batch.
    """

    parameters: int
    trainable: int
    bytes: int
    flops: int | None
    latency_ms: float


def cost(model: nn.Module, inputs: Tensor | Mapping[str, Any], *, runs: int = 10) -> Cost:
    """Measure a model on one batch, in eval mode and without gradients.

    Operations are those that PyTorch's counter knows, matrix products, convolutions and attention, a
    multiplication and an addition being two. What a custom kernel does is not seen.

    Args:
        model: called as `model(**inputs)` where the inputs are a mapping, else as `model(inputs)`.
        inputs: one batch on the model's device; its first tensor's first dimension is the batch size.
        runs: how many passes are timed, after a warm-up.

    Raises:
        InputError: there is no batch dimension to be found in the inputs, or `runs` is below 1.
    """
    if runs < 1:
        raise InputError(f"latency needs at least 1 run, found {runs}")
    batch = _batch_size(inputs)
    parameters = list(model.parameters())
    with torch.no_grad(), _left_as_found(model):
        model.eval()
        latency = _latency_ms(model, inputs, runs)
        operations = _operations(model, inputs)
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        bytes=_size(model),
        flops=None if operations is None else round(operations / batch),
        latency_ms=latency,
    )


def _batch_size(inputs: Tensor | Mapping[str, Any]) -> int:
    values = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    first = next((v for v in values if isinstance(v, Tensor)), None)
    if first is None or first.dim() == 0 or len(first) == 0:
        found = type(inputs).__name__ if first is None else f"a tensor of shape {tuple(first.shape)}"
        raise InputError(f"expected a batch, (samples, ...), as a tensor or in a mapping, found {found}")
    return len(first)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


def _size(model: nn.Module) -> int:
    """Bytes of all tensors; two that begin at the same place are one, be it a transposed view."""
    sizes: dict[tuple[torch.device, int], int] = {}
    for tensor in _tensors(model):
        place = (tensor.device, id(tensor) if tensor.is_meta else tensor.data_ptr())
        sizes[place] = max(sizes.get(place, 0), tensor.nbytes)
    return sum(sizes.values())


def _accelerators(model: nn.Module) -> set[torch.device]:
    return {tensor.device for tensor in _tensors(model) if tensor.device.type not in ("cpu", "meta")}


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Put back afterwards what a forward pass may change: modes, buffers, random state."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    gpus = [device for device in _accelerators(model) if device.type == "cuda"]
    with torch.random.fork_rng(devices=gpus):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer.copy_(value))


def _latency_ms(model: nn.Module, inputs: Tensor | Mapping[str, Any], runs: int) -> float:
    accelerators = _accelerators(model)

    def timed() -> float:
        start = time.perf_counter()
        call(model, inputs, task=_FIRST)
        for device in accelerators:
            torch.accelerator.synchronize(device)
        return 1000 * (time.perf_counter() - start)

    for _ in range(_WARM_UP):
        timed()
    return statistics.median(timed() for _ in range(runs))


def _operations(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> int | None:
    """Floating point operations of one pass, or None where the counter fails or knows none of them."""
    try:
        with _plain_kernels(), FlopCounterMode(display=False) as counter:
            call(eager(model), inputs, task=_FIRST)
    except Exception:
        return None
    return counter.get_total_flops() or None


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Without the fused kernels of attention, encoder layers and LSTMs: the counter does not see them."""
    mha, mkldnn, cudnn = torch.backends.mha, torch.backends.mkldnn, torch.backends.cudnn
    before = mha.get_fastpath_enabled(), mkldnn.enabled, cudnn.enabled
    mha.set_fastpath_enabled(False)
    mkldnn.enabled = False  # type: ignore[assignment]
    cudnn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        mha.set_fastpath_enabled(before[0])
        mkldnn.enabled, cudnn.enabled = before[1:]

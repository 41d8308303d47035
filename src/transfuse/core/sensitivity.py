"""How much a loss depends on every single weight, to first order: one backward pass per sample, counted at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def leaves(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with gradients of their own: for `run(role, batch, params=leaves)`. Nothing is copied."""
    return {name: p.detach().requires_grad_() for name, p in params.items() if p.is_floating_point()}


def add_sensitivity(totals: Mapping[str, Tensor], loss: Tensor, params: Mapping[str, Tensor]) -> None:
    """Add |theta * dL/dtheta| of one sample: what its loss would change by if the weight were zero, to first order.

    The absolute value is taken before samples are added, or samples of opposite sign would cancel. Every gradient is
    freed as soon as it is counted, so only the totals are as large as the model.

    Args:
        totals: by name, float32, of the parameters' shapes; added to in place.
        loss: of one sample, a scalar.
        params: :func:`leaves`, with which the loss was computed.
    """

    def count(name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None:
            totals[name].add_((parameter.detach().float() * gradient.float()).abs())
            parameter.grad = None

    handles = [
        p.register_post_accumulate_grad_hook(lambda parameter, name=name: count(name, parameter))
        for name, p in params.items()
    ]
    try:
        torch.autograd.backward(loss)
    finally:
        for handle in handles:
            handle.remove()

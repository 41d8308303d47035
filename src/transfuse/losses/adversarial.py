"""Losses of a game between a feature extractor and a discriminator of domains (Ganin et al., 2016, arXiv:1505.07818).

A discriminator's logit is the log-odds that a sample comes from the target domain. It minimises
:func:`domain_cross_entropy`; the extractor maximises the same value, because its gradient passes through
:func:`reverse_gradient` on the way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from transfuse.losses._inputs import at_least_float32


def reverse_gradient(values: Tensor, strength: float = 1.0) -> Tensor:
    """The same values; the gradient that comes back is multiplied by `-strength`.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> reverse_gradient(x, 0.5).sum().backward()
    >>> x.grad
    tensor([-0.5000, -0.5000])
    """
    reversed_: Tensor = _Reversal.apply(values, strength)
    return reversed_


def domain_cross_entropy(logits: Tensor, target: bool) -> Tensor:
    """Cross-entropy of a discriminator's logits, for samples that all come from one domain.

    Args:
        logits: log-odds of the target domain, `(batch,)` or `(batch, 1)`.
        target: whether the samples come from the target domain.

    Returns:
        `(batch,)`; log 2 where the discriminator cannot tell.

    Raises:
        ValueError: there is more than one logit per sample.
    """
    if logits.dim() == 2 and logits.shape[1] == 1:
        logits = logits[:, 0]
    if logits.dim() != 1:
        raise ValueError(f"a discriminator of two domains gives one logit per sample, found {tuple(logits.shape)}")
    odds = at_least_float32(logits)
    return F.softplus(-odds if target else odds)


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None

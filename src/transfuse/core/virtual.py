"""A step of gradient descent that is itself differentiable: the inner step of meta-learning."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def virtual_step(
    loss: Tensor,
    parameters: Mapping[str, Tensor],
    lr: float,
    weight_decay: float = 0.0,
    first_order: bool = False,
) -> dict[str, Tensor]:
    """The parameters after one step of SGD, as functions of the parameters before; nothing is moved.

        theta' = (1 - lr * weight_decay) * theta - lr * gradient of loss

    A loss at theta' (through `run(role, batch, params=theta')`) has the gradient
    (1 - lr * weight_decay - lr * Hessian) applied to its gradient at theta'.

    Args:
        loss: a scalar that depends on the parameters.
        parameters: by name, as `named_parameters()` gives them; those that need no gradient stay.
        lr: length of the step.
        weight_decay: as SGD has it.
        first_order: leave out the Hessian, which needs operations that can be differentiated twice.
    """
    moving = {name: p for name, p in parameters.items() if p.requires_grad}
    found = torch.autograd.grad(
        loss, list(moving.values()), create_graph=not first_order, retain_graph=True, allow_unused=True
    )
    stepped = {
        name: (1 - lr * weight_decay) * p - (0.0 if g is None else lr * g)
        for (name, p), g in zip(moving.items(), found, strict=True)
    }
    return {**parameters, **stepped}

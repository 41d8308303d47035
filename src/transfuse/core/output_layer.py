"""A language model's output layer, left out of a forward pass so that a loss can apply it piece by piece.

Logits of `(tokens, vocabulary)` are the largest thing in the training of a small language model. A loss that knows the
hidden states and the weight needs only a few rows of them at a time, see :mod:`transfuse.losses.fused`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError
from transfuse.core.outputs import call, find_logits, modes_kept
from transfuse.losses.scores import Projection


@torch.no_grad()
def find_output_layer(model: nn.Module, inputs: Any) -> nn.Linear | None:
    """The linear layer whose output a model returns as its logits, found by running one batch.

    None where there is no such layer, or leaving it out would not be the same: something is done to the logits
    afterwards (soft-capping, an adapter), the layer is quantised, parametrised or watched by hooks, or the model is
    compiled.
    """
    return output_layer_and_logits(model, inputs)[0]


def output_layer_and_logits(model: nn.Module, inputs: Any) -> tuple[nn.Linear | None, Tensor | None]:
    """The same, and the logits of that batch; None where the model was not run, or gives none."""
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        return None, None
    plain = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m) and not _watched(m)]
    given: list[tuple[nn.Linear, Tensor]] = []
    handles = [m.register_forward_hook(lambda m, _, output: given.append((m, output))) for m in plain]
    try:
        with modes_kept(model):
            logits = find_logits(call(model.eval(), inputs))
    except InputError:  # of a model without logits the method will say so, if it needs any
        return None, None
    finally:
        for handle in handles:
            handle.remove()
    return next((layer for layer, output in reversed(given) if output is logits), None), logits


@contextmanager
def left_out(layer: nn.Linear | None) -> Iterator[list[Projection]]:
    """Within the block a pass returns the hidden states in the place of logits; the projection is put into the list.

    Its weight is the one the layer has during the pass, be it the model's own or one it was called with.
    """
    found: list[Projection] = []
    if layer is None:
        yield found
        return

    def forward(hidden: Tensor) -> Tensor:
        kind, given = hidden.device.type, hidden
        if torch.is_autocast_enabled(kind):  # as the layer would have done
            given = hidden.to(torch.get_autocast_dtype(kind))
        weight: Tensor = layer.weight
        bias: Tensor | None = layer.bias
        if not torch.is_grad_enabled():  # the product is taken later, where gradients may be on: it must not learn then
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        found.append(Projection(given, weight, bias))
        return hidden

    layer.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        del layer.forward


def _watched(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)

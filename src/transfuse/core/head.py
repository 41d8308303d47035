"""A model's head, its last linear layer: found, and taken off, for methods that bring heads of their own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from transfuse.core.errors import LayerError
from transfuse.core.outputs import call, eager, find_logits
from transfuse.core.taps import trace_penultimate


def head_of(model: nn.Module, inputs: Any) -> str:
    """The path of a model's head, its last linear layer, found by running one batch.

    Raises:
        LayerError: there is none, or the model does something with its outputs, so that it cannot be replaced.
    """
    path = trace_penultimate(model, inputs).removesuffix(":input")
    with torch.no_grad():
        features = find_logits(call(headless(model, path), inputs))
        logits = find_logits(call(eager(model), inputs))
        head = model.get_submodule(path)
        if features.dim() != 2 or not torch.allclose(head(features), logits, atol=1e-5):
            raise LayerError(
                f"the outputs of {type(model).__name__} are not simply those of its last linear layer {path!r}, "
                "so that layer cannot be replaced by other heads: return its outputs as they are"
            )
    return path


def headless(model: nn.Module, path: str) -> nn.Module:
    """A copy of a model that returns the features its head would read."""
    body = copy.deepcopy(eager(model))
    parent, _, name = path.removeprefix("_orig_mod.").rpartition(".")
    setattr(body.get_submodule(parent), name, nn.Identity())
    return body

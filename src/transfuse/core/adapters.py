"""PEFT's LoRA around a model: which layers get an adapter, and the layers' factors as plain matrices."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError, MissingExtraError
from transfuse.core.output_layer import find_output_layer
from transfuse.core.outputs import eager

LINEAR = ("Linear", "Conv1D")
"""Classes of the layers that get an adapter; GPT-2 calls its own Conv1D."""


def adapted(
    model: nn.Module,
    inputs: Any,
    rank: int,
    alpha: float,
    *,
    layers: Sequence[str] | None = None,
    dropout: float = 0.0,
    purpose: str = "LLMNeo",
) -> Any:
    """PEFT's LoRA of a model that shares its weights' memory with it; `.model` is the module to run.

    Args:
        layers: paths of the layers that get an adapter; by default :func:`layers_to_adapt`.
        dropout: of the adapters' inputs.
        purpose: who needs PEFT, for the message.

    Raises:
        InputError: there is no layer to adapt, or there are adapters already.
        MissingExtraError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError:
        raise MissingExtraError("peft", "llm", purpose) from None
    if any(hasattr(m, "lora_A") for m in model.modules()):
        raise InputError("the target has adapters already: train them with KD, or merge them first")
    if layers is None:
        layers = layers_to_adapt(eager(model), inputs)
    # New parameters over the same memory, so that freezing them leaves the target's own as they were.
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    copied = copy.deepcopy(eager(model), shared)
    fan_in_fan_out = any(type(copied.get_submodule(name)).__name__ == "Conv1D" for name in layers)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # its scale is alpha / r, whole or not
        lora_dropout=dropout,
        target_modules=list(layers),
        fan_in_fan_out=fan_in_fan_out,
    )
    lora = LoraModel(copied, {"default": config}, "default")
    for p in lora.parameters():
        if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16):
            p.data = p.data.float()  # small steps would be lost in half precision
    return lora


def layers_to_adapt(model: nn.Module, inputs: Any) -> list[str]:
    """Paths of the linear layers that are neither the output layer nor share their weight with an embedding.

    Raises:
        InputError: there are none.
    """
    output = find_output_layer(model, inputs)
    named: Any = getattr(model, "get_output_embeddings", None)
    heads = {id(output), id(named() if named else None)}
    tied: set[int] = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = [
        name
        for name, m in model.named_modules()
        if type(m).__name__ in LINEAR
        and isinstance(weight := getattr(m, "weight", None), Tensor)
        and id(m) not in heads
        and id(weight) not in tied
    ]
    if not found:
        raise InputError(
            f"{type(model).__name__} has no linear layer beside its output layer that an adapter fits "
            f"({' or '.join(LINEAR)}): use KD"
        )
    return found


def factors(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter, float]:
    """B `(out, rank)`, A `(rank, in)` and the scale of an adapted layer: its weight stands for W + scale * B A, or for
    W + scale * (B A)^T where :func:`turned`."""
    found: Any = layer
    scale = float(found.scaling["default"])
    if "default" in found.lora_embedding_A:
        return found.lora_embedding_B["default"], found.lora_embedding_A["default"], scale
    return found.lora_B["default"].weight, found.lora_A["default"].weight, scale


def turned(layer: nn.Module) -> bool:
    """Whether a layer keeps its weight as `(in, out)`: embeddings, and GPT-2's Conv1D."""
    base = getattr(layer, "base_layer", layer)
    return isinstance(base, nn.Embedding) or type(base).__name__ == "Conv1D"

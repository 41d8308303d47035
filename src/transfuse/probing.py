"""What is found out about models and data from one real batch, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch, token_ids
from transfuse.core.errors import InputError, ShapeError, TransferError
from transfuse.core.outputs import call, eager, find_logits
from transfuse.core.run import Run
from transfuse.losses import IGNORE, cross_entropy
from transfuse.measure import cost


def infer_task(sample: Batch, logits: Tensor) -> str:
    """What the logits of one batch are about, from their shape and the labels.

    Raises:
        ShapeError: they have a shape of no known task.
    """
    if logits.dim() == 2:
        return "classification"
    if logits.dim() == 4:
        return "segmentation"
    if logits.dim() == 3:
        try:
            tokens = token_ids(sample)
        except InputError:
            return "token-classification"
        known = sample.labels is not None and sample.labels.shape == tokens.shape and sample.labels != IGNORE
        if sample.labels is None or bool((sample.labels == tokens)[known].all()):
            return "language-model"
        return "token-classification"
    raise ShapeError(
        f"the target gives logits of shape {tuple(logits.shape)}: expected (batch, classes), (batch, tokens, classes) "
        "or (batch, classes, height, width)"
    )


def has_labels(sample: Batch | None) -> bool:
    """Whether a batch has at least one label."""
    return sample is not None and sample.labels is not None and bool((sample.labels != IGNORE).any())


def reinitialised(model: nn.Module) -> nn.Module:
    """Redraw a model's weights with its layers' own initialisers, in place.

    Raises:
        InputError: a layer has parameters and no way to redraw them.
    """
    own = getattr(model, "_init_weights", None)  # Hugging Face models
    for name, module in model.named_modules():
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if callable(own):
            own(module)
        elif callable(reset):
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            raise InputError(
                f"'scratch' cannot redraw the layer {name!r} ({type(module).__name__}), which has parameters but no "
                "reset_parameters(): pass the target as a function that builds it, or compare with 'finetune'"
            )
    return model


def first_logits(role: str, model: nn.Module, sample: Batch) -> Tensor:
    """The logits of one batch, from a model that is left as it was.

    Raises:
        ShapeError: the model cannot run on it; the message says whose model it is, the shapes, and its own words.
        InputError: the logits are not finite although the inputs are.
    """
    run = Run({role: model}, {})
    run.set_modes(set())
    try:
        with run.probe(), torch.no_grad():
            logits = find_logits(call(eager(model), sample.inputs))
    except TransferError:
        raise
    except Exception as error:
        raise ShapeError(
            f"the {role}, {type(model).__name__}, cannot run on this data, {_shapes(sample)}: {error}"
        ) from error
    if not logits.isfinite().all() and _finite(sample):
        raise InputError(f"the {role}, {type(model).__name__}, gives logits that are not finite on the first batch")
    return logits


def require_fit(what: str, model: nn.Module, held_out: Batch, task: str) -> None:
    """Held-out data suits the target: else that would be known only after training."""
    try:
        logits = first_logits("target", model, held_out)
        if held_out.labels is not None and task != "language-model":
            cross_entropy(logits, held_out.labels)
    except TransferError as error:
        raise type(error)(f"{what}: {error}") from error
    except ValueError as error:
        raise ShapeError(f"{what}: {error}") from error


def _finite(sample: Batch) -> bool:
    values = sample.inputs.values() if isinstance(sample.inputs, Mapping) else [sample.inputs]
    return all(bool(v.isfinite().all()) for v in values if isinstance(v, Tensor) and v.is_floating_point())


def _shapes(sample: Batch) -> str:
    if isinstance(sample.inputs, Mapping):
        return "inputs " + ", ".join(f"{k} {tuple(v.shape)}" for k, v in sample.inputs.items())
    return f"inputs of shape {tuple(sample.inputs.shape)}"


def footprint(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """What a model costs, as reports list it."""
    return {name: value for name, value in asdict(cost(model, inputs)).items() if name != "trainable"}

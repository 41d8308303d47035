"""Tiny models, data and runs that several test files share."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import transfuse.distill
from transfuse.core.batch import Batch
from transfuse.core.method import Method
from transfuse.core.streams import Data, as_data
from transfuse.core.trainer import Trainer
from transfuse.core.training import Training
from transfuse.distill import Distillation
from transfuse.models.lm import DecoderLM

torch.set_num_threads(1)  # sums in one order, so that runs can be compared bit by bit

CLASSES, SIDE, VOCABULARY = 3, 4, 11


@dataclass
class Example:
    """A method with the least it runs on, as :func:`transfuse.transfer` takes it; under a second of training.

    Tests that are generated from the catalogue run one of each method, see `tests/test_every_method.py`.
    """

    method: Method
    target: nn.Module
    source: Any = None
    data: Any = None
    test: Any = None
    options: dict[str, Any] = field(default_factory=dict)


class CNN(nn.Module):
    """Two convolutions `layer1`, `layer2`, an average and a head `fc`, for 4x4 images; counts its forward passes."""

    def __init__(self, width: int = 4, dropout: float = 0.0, norm: bool = False, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layer1 = nn.Conv2d(1, width, 3, padding=1)
            self.norm: nn.Module = nn.BatchNorm2d(width) if norm else nn.Identity()
            self.layer2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
            self.act = nn.Tanh()
            self.drop = nn.Dropout(dropout)
            self.fc = nn.Linear(2 * width, CLASSES)
        self.calls: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append(self.training)
        x = self.norm(self.layer1(images)).tanh()
        x = self.act(self.layer2(x)).mean((2, 3))
        return self.fc(self.drop(x))


def language_model(seed: int = 0, dim: int = 8, depth: int = 1) -> DecoderLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DecoderLM(VOCABULARY, dim=dim, depth=depth, heads=2, context=16, tie=False)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        return model


def llama(seed: int = 0, **given: Any) -> nn.Module:
    """A tiny decoder of Hugging Face, in eval mode; what is given changes its configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5, "max_position_embeddings": 32,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(settings | given))).eval()


def images(count: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and labels, one in three not labelled."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    labels[::3] = -100
    return torch.randn(count, 1, SIDE, SIDE, generator=draw), labels


def ragged_tokens(count: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Token ids of 2 to 9 tokens each, padded on the right, as a Hugging Face tokenizer gives them."""
    draw = torch.Generator().manual_seed(seed)
    lengths = 2 + torch.arange(count) * 7 % 8
    mask = (torch.arange(9) < lengths[:, None]).long()
    tokens = torch.randint(VOCABULARY, (count, 9), generator=draw) * mask
    return {"input_ids": tokens, "attention_mask": mask}


METHODS: list[type[Distillation]] = [
    cls
    for name in transfuse.distill.__all__
    if isinstance(cls := getattr(transfuse.distill, name), type)
    and "card" in vars(cls)
    and cls.losses is Distillation.losses
    and cls is not transfuse.distill.TopKD  # it needs more than CLASSES
    and cls is not transfuse.distill.TinyViT  # it needs stored answers in its data
    and cls is not transfuse.distill.Swing  # it needs to know which tokens are private
]
"""Every method of the family, from its public names, whose step is that of the family: `loss(student, teacher, batch,
clock)` on the data as it comes. Methods that train their teachers too (`Online`) or make batches of their own (`SLA`)
have tests of their own."""


def declared(name: str) -> dict[type[Distillation], Any]:
    """What the modules `tests/distill/examples_*.py` say about their methods under this name, in one dict.

    `FORMULAS`: the loss as a loop, `formula(method, student, teacher, labels) -> float` over float64 rows of logits
    `(rows, classes)`. `NOT_ZERO`, `COUPLED`: why the loss is not zero where student equals teacher (its gradient may
    be), or depends on how a batch is cut.
    """
    found: dict[type[Distillation], Any] = {}
    for path in sorted((Path(__file__).parent / "distill").glob("examples_*.py")):
        found |= getattr(importlib.import_module(f"distill.{path.stem}"), name, {})
    return found


def make(cls: type[Distillation], layer: str = "layer2") -> Distillation:
    """A method with its defaults; taps without a default read `layer` on both sides."""
    required = [n for n, p in inspect.signature(cls.__init__).parameters.items() if p.default is p.empty]
    return cls(**{n: layer for n in required if n in ("student", "teacher")})


def trainer(
    method: Method,
    target: nn.Module,
    source: nn.Module | None,
    data: Any,
    *,
    folder: Path | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    listener: Callable[..., None] | None = None,
    task: str = "classification",
    shuffled: bool = False,
    sync: Any = None,
    **training: Any,
) -> Trainer:
    """A trainer over one stream, for few steps of plain SGD unless told otherwise."""
    settings = {"batch_size": 6, "optimizer": "sgd", "lr": 0.1, "checkpoint_every": 0.0} | training
    if "epochs" not in settings:
        settings.setdefault("steps", 4)
    streams = data if isinstance(data, Mapping) and all(isinstance(d, Data) for d in data.values()) else None
    return Trainer(
        method,
        {"target": target} if source is None else {"target": target, "source": source},
        streams if streams is not None else {"data": as_data(data)},
        Training(**settings),
        folder=folder,
        validate=validate,
        listener=listener,
        task=task,
        shuffled=shuffled,
        sync=sync,
    )


def first_gradients(
    method: Method, target: nn.Module, source: nn.Module | None, data: Any, **settings: Any
) -> dict[str, Tensor]:
    """The gradient of the first update on every parameter of the target and of the method."""
    found: dict[str, Tensor] = {}

    def take(trainer: Trainer, record: Any) -> None:
        for module in (target, method):
            named = {f"{type(module).__name__}.{n}": p for n, p in module.named_parameters()}
            found.update({n: p.grad.clone() for n, p in named.items() if p.grad is not None})

    settings = {"steps": 1, "batch_size": 12, "shuffle": False, "weight_decay": 0.0} | settings
    trainer(method, target, source, data, listener=take, **settings).fit()
    return found


def assert_equal_gradients(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    size = max(float(g.abs().max()) for g in one.values())
    assert size > 1e-3, "nothing to compare"
    for name, gradient in one.items():
        assert (gradient - other[name]).abs().max() <= tolerance * max(1.0, size), name


def digest(module: nn.Module) -> str:
    """A hash over the bits of everything in a state dict."""
    whole = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        whole.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()


def batch(count: int = 12, seed: int = 0) -> Batch:
    inputs, labels = images(count, seed)
    return Batch(inputs=inputs, labels=labels)

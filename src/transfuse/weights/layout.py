"""Where the parts of a transformer are, by the names that its layers have in the field.

Llama, Mistral and Qwen, GPT-2, BERT, and models with timm's names (`attn.qkv`, `mlp.fc1`) are known; so is any model
of the user's that calls its layers the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError
from transfuse.core.outputs import call, modes_kept


@dataclass(frozen=True)
class Layer:
    """Paths of the linear layers of one block.

    Attributes:
        attention: query, key and value, or one that is all three side by side.
        output: what writes attention into the stream.
        rise: the perceptron's first layer; of a gated one the gate, then the other.
        down: its last.
    """

    attention: tuple[str, ...]
    output: str
    rise: tuple[str, ...]
    down: str

    @property
    def perceptron(self) -> str:
        """The innermost module that holds the perceptron."""
        return _holding(self.rise[0], self.down)

    @property
    def block(self) -> str:
        """The innermost module that holds attention and perceptron."""
        return _holding(self.output, self.down)


def _holding(path: str, other: str) -> str:
    pairs = zip(path.split("."), other.split("."), strict=False)
    return ".".join(part for part, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


NAMES = (
    Layer(("q_proj", "k_proj", "v_proj"), "o_proj", ("gate_proj", "up_proj"), "down_proj"),
    Layer(("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj"),
    Layer(("attn.qkv",), "attn.proj", ("mlp.fc1",), "mlp.fc2"),
    Layer(("query", "key", "value"), "attention.output.dense", ("intermediate.dense",), "output.dense"),
)


def layers_of(model: nn.Module) -> list[Layer]:
    """The blocks of a transformer, in order.

    Raises:
        InputError: its layers have other names.
    """
    paths = [path for path, _ in model.named_modules()]
    for names in NAMES:
        kinds = (*names.attention, names.output, *names.rise, names.down)
        found = [_ending(paths, name) for name in kinds]
        if found[0] and len({len(each) for each in found}) == 1:
            a = len(names.attention)
            return [Layer(tuple(row[:a]), row[a], tuple(row[a + 1 : -1]), row[-1]) for row in zip(*found, strict=True)]
    known = "; ".join(", ".join((*n.attention, n.output, *n.rise, n.down)) for n in NAMES)
    raise InputError(f"no transformer blocks found in {type(model).__name__}: their layers must be called {known}")


def _ending(paths: list[str], name: str) -> list[str]:
    found = [p for p in paths if p == name or p.endswith("." + name)]
    return [p for p in found if name != "output.dense" or not p.endswith("attention.output.dense")]


def transposed(module: nn.Module) -> bool:
    """Whether a layer stores its weight as `(in, out)`, as GPT-2's Conv1D does."""
    return type(module).__name__ == "Conv1D"


def heads_of(model: nn.Module) -> int | None:
    """The number of attention heads, where the model says it."""
    config: Any = getattr(model, "config", None)
    said = [getattr(config, name, None) for name in ("num_attention_heads", "n_head")]
    said += [getattr(m, name, None) for m in model.modules() for name in ("heads", "num_heads")]
    return next((heads for heads in said if isinstance(heads, int)), None)


def groups_of(model: nn.Module) -> int | None:
    """The number of key and value heads, which query heads may share."""
    groups = getattr(getattr(model, "config", None), "num_key_value_heads", None)
    return groups if isinstance(groups, int) else heads_of(model)


@torch.no_grad()
def reads_inputs(model: nn.Module, inputs: Any) -> set[nn.Module]:
    """The layers with weights that are given the model's inputs as they are, found by running one batch."""
    tensors = [t for t in (inputs.values() if isinstance(inputs, dict) else [inputs]) if isinstance(t, Tensor)]
    found: set[nn.Module] = set()

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            given = args[0].flatten()
            if any(t.numel() == given.numel() and torch.equal(t.flatten(), given) for t in tensors):
                found.add(module)

    handles = [m.register_forward_pre_hook(look) for m in model.modules() if [*m.parameters(recurse=False)]]
    try:
        with modes_kept(model):
            call(model.eval(), inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found

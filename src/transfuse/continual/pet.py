"""Parameter-efficient modules that are put into a copy of a model: scale and shift, adapters, prompts.

Each starts as the identity, so the copy computes at first what the model computes (prompts excepted).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError
from transfuse.core.outputs import call, eager
from transfuse.core.taps import Taps, resolve

PETS = ("full", "adapter", "ssf", "vpt-shallow", "vpt-deep", "bn")
OPERATIONS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
WHERE = {"adapter": "*.mlp", "vpt-shallow": "blocks.*", "vpt-deep": "blocks.*"}


class ScaleShift(nn.Module):
    """`gamma * layer(x) + beta` per channel (SSF: Lian et al., NeurIPS 2022, arXiv:2210.08823)."""

    def __init__(self, layer: nn.Module, channels: int):
        super().__init__()
        self.layer = layer
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out = self.layer(*args, **kwargs)
        shape = (-1, 1, 1) if out.dim() == 4 else (-1,)
        return self.gamma.view(shape) * out + self.beta.view(shape)


class Adapter(nn.Module):
    """`layer(x) + up(relu(down(x)))`, parallel to a layer; `up` starts at zero (AdaptFormer: arXiv:2205.13535).

    Works on the last axis of tokens and on the channels of maps that keep their size.
    """

    def __init__(self, layer: nn.Module, inputs: int, outputs: int, width: int, maps: bool):
        super().__init__()
        self.layer = layer
        self.down: nn.Module = nn.Conv2d(inputs, width, 1) if maps else nn.Linear(inputs, width)
        self.up: nn.Module = nn.Conv2d(width, outputs, 1) if maps else nn.Linear(width, outputs)
        for p in self.up.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer(x, *args, **kwargs) + self.up(self.down(x).relu())


class Prompted(nn.Module):
    """A block whose tokens `(batch, tokens, dim)` get prompts behind the first, the class token.

    (VPT: Jia et al., ECCV 2022, arXiv:2203.12119.)

    Args:
        block: the block.
        prompts: prompts that are put in, `(count, dim)`; None puts in none.
        leave: how many tokens behind the first are taken out again afterwards.
    """

    def __init__(self, block: nn.Module, prompts: Tensor | None, leave: int):
        super().__init__()
        self.block, self.leave = block, leave
        self.prompts = None if prompts is None else nn.Parameter(prompts)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.prompts is not None:
            x = torch.cat([x[:, :1], self.prompts.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        x = self.block(x, *args, **kwargs)
        return torch.cat([x[:, :1], x[:, 1 + self.leave :]], dim=1) if self.leave else x


def with_pet(
    model: nn.Module, pet: str, inputs: Any, *, layers: Sequence[str] | None, width: int, prompts: int, seed: int
) -> nn.Module:
    """A copy of a model with parameter-efficient modules, in which these alone can learn.

    Args:
        pet: one of `PETS`. `"full"` lets everything learn, `"bn"` nothing: its statistics are estimated anew.
        inputs: one batch, from which shapes are read.
        layers: taps of the layers to adapt; by default every linear, convolutional and normalisation layer (ssf),
            layers called `mlp` (adapter), and those of `blocks` (prompts).
        width: of an adapter's bottleneck.
        prompts: prompt tokens per block.
        seed: of what is drawn.

    Raises:
        InputError: the model has no such layers, or they have the wrong shape.
    """
    adapted = copy.deepcopy(eager(model)).requires_grad_(pet == "full")
    if pet in ("full", "bn"):
        return adapted
    paths = _paths(adapted, pet, layers)
    shapes = _shapes(adapted, paths, inputs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, path in enumerate(paths):
            layer, (before, after) = adapted.get_submodule(path), shapes[path]
            build = _builder(pet, path, before, after, width, prompts, number == 0, number == len(paths) - 1)
            device = next(layer.parameters()).device
            parent, _, name = path.rpartition(".")
            setattr(adapted.get_submodule(parent), name, build(layer).to(device))
    return adapted


def _builder(
    pet: str, path: str, before: torch.Size, after: torch.Size, width: int, prompts: int, first: bool, last: bool
) -> Callable[[nn.Module], nn.Module]:
    maps = len(after) == 4
    if pet == "ssf":
        return lambda layer: ScaleShift(layer, after[1 if maps else -1])
    if pet == "adapter":
        if len(before) != len(after) or (maps and before[2:] != after[2:]):
            raise InputError(f"an adapter beside {path!r} needs outputs of the inputs' size, found {before} to {after}")
        axis = 1 if maps else -1
        return lambda layer: Adapter(layer, before[axis], after[axis], width, maps)
    if len(before) != 3:
        raise InputError(f"prompts need tokens (batch, tokens, dim), {path!r} reads {tuple(before)}: use 'ssf'")
    deep = pet == "vpt-deep"
    fresh = 0.02 * torch.randn(prompts, before[-1]) if deep or first else None
    return lambda block: Prompted(block, fresh, prompts if deep or last else 0)


def _paths(model: nn.Module, pet: str, layers: Sequence[str] | None) -> list[str]:
    if layers is not None:
        return [path for name in layers for path in resolve(model, name)]
    if pet == "ssf":
        return [n for n, m in model.named_modules() if isinstance(m, OPERATIONS)]
    try:
        return resolve(model, WHERE[pet])
    except InputError as error:
        raise InputError(f"{pet!r} looks for layers called {WHERE[pet]!r}: name others with layers=. {error}") from None


@torch.no_grad()
def _shapes(model: nn.Module, paths: Sequence[str], inputs: Any) -> dict[str, tuple[torch.Size, torch.Size]]:
    taps = Taps(model, [side for path in paths for side in (f"{path}:input", path)])
    with taps.open() as features:
        call(model, inputs)
    taps.remove()
    return {path: (features[f"{path}:input"].shape, features[path].shape) for path in paths}


def batch_norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The batch-norm layers that keep statistics, by path."""
    kinds = nn.modules.batchnorm._BatchNorm
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds) and m.running_mean is not None}

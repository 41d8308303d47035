"""Letters and digits at 14x14 pixels, a network that reads them in plain fonts, and copies tuned to other tasks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from proofs.runner import SMOKE_STEPS
from transfuse import transfer
from transfuse.core import rng
from transfuse.core.streams import as_data
from transfuse.datasets.glyphs import draw
from transfuse.discover.views import view
from transfuse.distill import Labels
from transfuse.evaluation import evaluate
from transfuse.models import SmallCNN

SIDE, LETTERS, DIGITS = 14, 26, 10
CLASSES = LETTERS + DIGITS
Pair = tuple[Tensor, Tensor]


class Reader(SmallCNN):
    """A small CNN with group normalisation: task vectors have no running statistics to disagree about."""

    def __init__(self) -> None:
        super().__init__(width=8, classes=CLASSES)
        for block, channels in ((self.layer1, 8), (self.layer2, 16), (self.layer3, 32)):
            block.bn = nn.GroupNorm(8, channels)


@cache
def pictures(script: str, style: str, part: str, copies: int = 1, seed: int = 0) -> Pair:
    """Drawings of one script; small letters count as their capitals, digits come after the letters."""
    found = draw(script, style, SIDE, copies, seed).part(part)
    inputs, labels = found.tensors
    return inputs, labels + (LETTERS if script == "digits" else 0)


def both(*pairs: Pair) -> Pair:
    """Several sets in one."""
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def turned(images: Tensor, degrees: float) -> Tensor:
    """Every picture turned about its middle."""
    angle = torch.tensor(degrees).deg2rad()
    matrix = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    grid = F.affine_grid(F.pad(matrix, (0, 1)).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def noisy(images: Tensor, size: float = 0.25) -> Tensor:
    """Every pixel with Gaussian noise, the same for the same pictures."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(len(images)))
    return (images + size * noise).clamp(0, 1)


PLAIN = "sans upright regular"


def _changed(change: Callable[[Tensor], Tensor]) -> Pair:
    inputs, labels = pictures("latin", PLAIN, "train", copies=2)
    return change(inputs), labels


TASKS: Mapping[str, Callable[[], Pair]] = {
    "turned": lambda: _changed(lambda x: turned(x, 25.0)),
    "inverted": lambda: _changed(lambda x: 1 - x),
    "italic": lambda: pictures("latin", "italic regular", "train"),
    "bold": lambda: pictures("latin", "bold upright", "train"),
    "digits": lambda: pictures("digits", "upright", "train", copies=2),
    "small": lambda: pictures("latin-small", PLAIN, "train", copies=2),
    "serif": lambda: pictures("latin", "serif upright", "train", copies=2),
    "noise": lambda: _changed(noisy),
}
"""What the copies were tuned to."""


@cache
def base(smoke: bool) -> nn.Module:
    """Taught capitals and digits in plain fonts, as they are and in three random views of each."""
    plain = both(pictures("latin", PLAIN, "train", copies=2), pictures("digits", PLAIN, "train", copies=2))
    with rng.scope(0):
        views = [(view(plain[0], mirror=False), plain[1]) for _ in range(3)]
    return learned(Labels(), None, Reader, both(plain, *views), smoke, seed=0, steps=600, lr=5e-3)


@cache
def tuned(task: str, smoke: bool) -> nn.Module:
    """The base tuned to a task, its head as it was."""
    return learned(Labels(), None, frozen_head(base(smoke)), TASKS[task](), smoke, seed=0, steps=100, lr=2e-3)


def frozen_head(model: nn.Module) -> nn.Module:
    """A copy whose head is not trained."""
    model = copy.deepcopy(model)
    model.get_submodule("fc").requires_grad_(False)
    return model


def learned(method: Any, source: Any, target: Any, data: Any, smoke: bool, seed: int, **training: Any) -> nn.Module:
    """What a method makes of the target."""
    if smoke:
        training["steps"] = SMOKE_STEPS
        training.pop("epochs", None)
    training.setdefault("batch_size", 64)
    return transfer(method, source, target, data, seeds=[seed], task="classification", **training).model


def accuracy(model: nn.Module, data: Pair) -> float:
    """Share of right answers."""
    return evaluate(model, as_data(TensorDataset(*data)), task="classification", batch_size=512).metrics["accuracy"]


def split(data: Pair, shots: int, seed: int) -> tuple[Pair, Pair]:
    """So many samples of every class, and all the others."""
    inputs, labels = data
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty_like(order)
    for c in labels.unique():
        members = order[labels[order] == c]
        rank[members] = torch.arange(len(members))
    few = rank < shots
    return (inputs[few], labels[few]), (inputs[~few], labels[~few])

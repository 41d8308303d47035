"""A model as flat vectors on the CPU, as they travel between server and clients and are kept by the server."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.errors import ShapeError
from transfuse.core.method import Bag

Payload = dict[str, Tensor]
"""What is sent in one direction, by name."""


class Server(Bag):
    """What the server knows. It stays on the CPU, whatever the device, so that clients cost no accelerator memory."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Server:
        return self

    def pop(self, name: str) -> Tensor:
        """Take a tensor out."""
        value = self[name]
        del self[name]
        return value


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Copies of the tensors' elements in one vector."""
    parts = [t.detach().flatten() for t in tensors]
    return torch.cat(parts) if parts else torch.zeros(0)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that gradients are taken on."""
    return [p for p in model.parameters() if p.requires_grad]


def pieces(vector: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    """Cut a vector into pieces of the shapes, and on the devices, of some tensors.

    Raises:
        ShapeError: it has another number of elements than they have.
    """
    like = list(like)
    sizes = [t.numel() for t in like]
    if vector.shape != (sum(sizes),):
        raise ShapeError(
            f"a payload holds {tuple(vector.shape)} numbers where the model has {sum(sizes)}: "
            "server and clients must build the same model"
        )
    return [part.view(t.shape).to(t.device) for part, t in zip(vector.split(sizes), like, strict=True)]


def read(model: nn.Module) -> Payload:
    """All parameters as `weights`, floating buffers as `floats`, other buffers as `integers`; none of these is empty.

    Shared parameters are there once, and buffers that a model does not save (masks, positions) are not.
    """
    return {name: flat(tensors).cpu() for name, tensors in _parts(model).items() if tensors}


@torch.no_grad()
def write(model: nn.Module, state: Payload) -> None:
    """Copy into a model what :func:`read` gave. (Copy: a view would let training write into the server's state.)"""
    for name, tensors in _parts(model).items():
        if name in state:
            for tensor, piece in zip(tensors, pieces(state[name], tensors), strict=True):
                tensor.copy_(piece)


def size(payload: Payload) -> int:
    """Bytes of a payload."""
    return sum(t.numel() * t.element_size() for t in payload.values())


def _parts(model: nn.Module) -> dict[str, list[Tensor]]:
    saved = model.state_dict(keep_vars=True)
    buffers = [b for name, b in model.named_buffers() if name in saved]
    return {
        "weights": list(model.parameters()),
        "floats": [b for b in buffers if b.is_floating_point()],
        "integers": [b for b in buffers if not b.is_floating_point()],
    }

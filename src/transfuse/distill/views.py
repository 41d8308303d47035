"""Every picture several times, transformed: views, their labels, and what they say together. Used by `sla.py`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError
from transfuse.core.outputs import find_logits
from transfuse.losses import IGNORE

Average = Literal["logits", "probabilities"]
CHANNELS = "RGB"


class Views:
    """M transformations of a picture: every rotation with every order of the colours.

    Rows are image-major: row i * M + j is view j of image i. Joint classes are class-major: class n seen in view j
    is n * M + j.

    Args:
        rotations: degrees, multiples of 90, counter-clockwise.
        colours: orders of the channels, for instance `"RGB"` (as they are) and `"GBR"`.

    Raises:
        InputError: a transformation is unknown or named twice, or the identity (0 and `"RGB"`) is missing.
    """

    def __init__(self, rotations: Sequence[int], colours: Sequence[str]):
        for name, given, identity in (("rotations", rotations, 0), ("colours", colours, CHANNELS)):
            if len(set(given)) < len(given):
                raise InputError(f"{name} are {list(given)}: name each once, equal views cannot be told apart")
            if identity not in given:
                raise InputError(f"{name} are {list(given)}: {identity!r}, the picture as it is, must be among them")
        if any(rotation not in (0, 90, 180, 270) for rotation in rotations):
            raise InputError(f"rotations are among 0, 90, 180 and 270 degrees, found {list(rotations)}")
        if any(sorted(order) != sorted(CHANNELS) for order in colours):
            raise InputError(f"colours are orders of the letters {CHANNELS}, found {list(colours)}")
        self.names = list(product(rotations, colours))
        self.identity = self.names.index((0, CHANNELS))

    def __len__(self) -> int:
        return len(self.names)

    def __call__(self, images: Tensor) -> Tensor:
        """`(batch, channels, height, width)` to `(batch * M, channels, height, width)`.

        Raises:
            ValueError: no such images, not square where they are turned by 90 degrees, or without three colours
                where these are exchanged.
        """
        if images.dim() != 4:
            raise ValueError(f"views are of images (batch, channels, height, width), found {tuple(images.shape)}")
        if images.shape[2] != images.shape[3] and any(rotation % 180 for rotation, _ in self.names):
            raise ValueError(f"images of {images.shape[2]}x{images.shape[3]} turned by 90 degrees have another shape")
        if images.shape[1] != 3 and any(colours != CHANNELS for _, colours in self.names):
            raise ValueError(f"colours can be exchanged in images of three channels, found {images.shape[1]}")
        views = [
            torch.rot90(images if c == CHANNELS else images[:, [CHANNELS.index(x) for x in c]], r // 90, (2, 3))
            for r, c in self.names
        ]
        return torch.stack(views, dim=1).flatten(0, 1)

    def repeat(self, labels: Tensor) -> Tensor:
        """`(batch,)` labels for every view: `(batch * M,)`."""
        return labels.repeat_interleave(len(self))

    def numbers(self, labels: Tensor) -> Tensor:
        """Which view each row is, `(batch * M,)`; IGNORE where the image has no label."""
        return self._where_labelled(labels, torch.arange(len(self), device=labels.device).repeat(len(labels)))

    def joint(self, labels: Tensor) -> Tensor:
        """The class of (label, view) of every row, `(batch * M,)`; IGNORE where the image has no label."""
        return self._where_labelled(labels, self.repeat(labels) * len(self) + self.numbers(labels))

    def aggregate(self, joint: Tensor, average: Average = "logits") -> Tensor:
        """What all views of an image say about its class: `(batch * M, classes * M)` to `(batch, classes)`.

        Each view votes with the joint classes of its own number. Averaged are logits, or the views' probabilities
        of the classes, as log-probabilities.
        """
        m = len(self)
        own = joint.view(-1, m, joint.shape[1] // m, m).diagonal(dim1=1, dim2=3)  # (batch, classes, M)
        if average == "logits":
            return own.mean(-1)
        return own.log_softmax(1).logsumexp(-1) - torch.tensor(float(m)).log().to(joint.device)

    def single(self, joint: Tensor) -> Tensor:
        """The joint classes of the identity: `(rows, classes * M)` to `(rows, classes)`, or rows of a weight."""
        return joint[..., self.identity :: len(self)]

    def same(self, images: Tensor) -> list[tuple[tuple[int, str], tuple[int, str]]]:
        """Pairs of views that do nothing different to these images."""
        views = self(images).view(len(images), len(self), *images.shape[1:])
        pairs = [(j, k) for k in range(len(self)) for j in range(k)]
        return [(self.names[j], self.names[k]) for j, k in pairs if torch.equal(views[:, j], views[:, k])]

    def _where_labelled(self, labels: Tensor, rows: Tensor) -> Tensor:
        return torch.where(self.repeat(labels) == IGNORE, IGNORE, rows)


class Aggregated(nn.Module):
    """A classifier of joint classes, as a classifier of images: it sees every view and averages.

    Args:
        model: images to logits `(batch, classes * M)`.
        views: the views that it was trained on.
        average: see :meth:`Views.aggregate`.
    """

    def __init__(self, model: nn.Module, views: Views, average: Average = "logits"):
        super().__init__()
        self.model, self.views, self.average = model, views, average

    def forward(self, images: Tensor) -> Tensor:
        return self.views.aggregate(find_logits(self.model(self.views(images))), self.average)

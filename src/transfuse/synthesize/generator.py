"""The engine of data-free transfer: a generator of images, a pool of what it made, and an eye on its collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transfuse.core import rng
from transfuse.core.method import Bag
from transfuse.core.run import Run
from transfuse.losses import mutual_information, variance_within_classes


class Generator(nn.Module):
    """Latent vectors `(batch, latent)` to images `(batch, channels, height, width)`.

    A linear layer to a quarter of the resolution, then twice: upsampling, convolution, batch normalisation, leaky
    ReLU; a last convolution and a sigmoid. Normalisation always takes the batch's own statistics and keeps none, so
    that making images moves nothing.

    Args:
        shape: of an image, `(channels, height, width)`.
        latent: size of a latent vector.
        width: channels of the last hidden layer; the others have twice as many.
        limits: least and greatest value of a pixel.
    """

    def __init__(self, shape: Sequence[int], latent: int, width: int = 64, limits: Sequence[float] = (0.0, 1.0)):
        super().__init__()
        channels, *size = shape
        quarter, half = (tuple(math.ceil(s / d) for s in size) for d in (4, 2))
        self.low, self.high = limits
        self.project = nn.Linear(latent, 2 * width * math.prod(quarter))
        self.layers = nn.Sequential(
            nn.Unflatten(1, (2 * width, *quarter)),
            _norm(2 * width),
            nn.Upsample(size=half),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            _norm(2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample(size=tuple(size)),
            nn.Conv2d(2 * width, width, 3, padding=1),
            _norm(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, latent: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * self.layers(self.project(latent))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, track_running_stats=False)


def redraw(network: nn.Module, source: torch.Generator) -> None:
    """Give a network new initial weights: the same ones in every process, if `source` is `run.shared_rng(...)`."""
    with rng.scope(source.initial_seed()):
        for layer in network.modules():
            if callable(reset := getattr(layer, "reset_parameters", None)):
                reset()


class Pool(Bag):
    """Made samples in a ring of slots, one batch in each: the newest takes the place of the oldest.

    Args:
        slots: how many batches are kept.
    """

    def __init__(self, slots: int):
        super().__init__()
        self.slots = slots
        self["pushed"] = torch.tensor(0)

    def __len__(self) -> int:
        return len(self["samples"]) if "samples" in self else 0

    def push(self, samples: Tensor) -> None:
        """Keep a batch, without its graph; batches are of one size."""
        samples = samples.detach()[None]
        if len(self) < self.slots:
            self["samples"] = torch.cat([self["samples"], samples]) if len(self) else samples.clone()
        else:
            self["samples"][int(self["pushed"]) % self.slots] = samples[0]
        self["pushed"] += 1

    def slot(self, draw: torch.Generator) -> Tensor:
        """One of the batches, each with the same probability."""
        return self["samples"][int(torch.randint(len(self), (1,), generator=draw))]

    def draw(self, count: int) -> Tensor:
        """So many samples of all batches, each with the same probability."""
        samples = self["samples"].flatten(0, 1)
        return samples[torch.randint(len(samples), (count,), device=samples.device)]


def gather(pieces: Sequence[tuple[Tensor, Tensor]], run: Run) -> Tensor:
    """The samples of a whole update, in order and the same in every process.

    Args:
        pieces: numbers within the update and samples, of each of this process's micro-batches.
    """
    size = int(run.sync.sum(torch.tensor(float(sum(len(numbers) for numbers, _ in pieces)))))
    whole = pieces[0][1].new_zeros(size, *pieces[0][1].shape[1:])
    for numbers, samples in pieces:
        whole[numbers] = samples
    return run.sync.sum(whole)


class CollapseWatch(nn.Module):
    """Tells the user when a generator has collapsed: what it makes is of one class, or one image per class.

    A round is bad if the teacher tells apart less than a tenth of the classes that it could beyond the first,

        exp(H(mean p) - mean H(p)) < 1 + 0.1 * (min(classes, batch) - 1),   p = softmax of the teacher's logits,

    or if less than 1 % of the variance of the pixels is within the classes that the teacher sees. Collapse is
    reported when `patience` rounds in a row were bad: single ones are common just after a generator was reset.
    """

    CLASSES, VARIANCE = 0.1, 0.01

    def __init__(self, patience: int, advice: str):
        super().__init__()
        self.patience, self.advice = patience, advice
        self.register_buffer("bad", torch.zeros(2))
        self.bad: Tensor

    @torch.no_grad()
    def look(self, images: Tensor, logits: Tensor, run: Run) -> None:
        """Look at one round's images and the teacher's answers to them."""
        found = torch.stack([mutual_information(logits).exp(), variance_within_classes(images, logits.argmax(1))])
        told, variance = (run.sync.sum(found) / run.world).tolist()
        most = min(logits.shape)
        signs = torch.tensor([told < 1 + self.CLASSES * (most - 1), variance < self.VARIANCE])
        self.bad.copy_((self.bad + 1) * signs.to(self.bad.device))
        if self.bad[0] >= self.patience:
            self._say(
                run, "classes", f"the teacher tells only {told:.1f} of at most {most} classes apart in its images"
            )
        if self.bad[1] >= self.patience:
            self._say(run, "images", f"only {variance:.2%} of the variance of its images is within a class")

    def _say(self, run: Run, finding: str, what: str) -> None:
        run.watch.say(
            f"collapse: {finding}",
            f"the generator has collapsed: for {self.patience} rounds, {what}. "
            f"A student learns next to nothing from such images. {self.advice}",
        )

"""Category embeddings with diffused noise: what drives the generator of CAE-DFKD."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError
from transfuse.core.sentences import embed_sentences

INDEX_SIZE = 384


def _laplace(shape: torch.Size, device: torch.device) -> Tensor:
    sign = torch.randint(2, shape, device=device) * 2 - 1
    return sign * torch.empty(shape, device=device).exponential_(math.sqrt(2))


SOURCES: dict[str, Callable[[torch.Size, torch.device], Tensor]] = {
    "gaussian": lambda shape, device: torch.randn(shape, device=device),
    "uniform": lambda shape, device: (2 * torch.rand(shape, device=device) - 1) * math.sqrt(3),
    "laplace": _laplace,
    "masked": lambda shape, device: (
        torch.randn(shape, device=device) * torch.randint(2, shape, device=device) * math.sqrt(2)
    ),
}
"""Noise of mean 0 and variance 1 by name; `"masked"` is Gaussian noise in a random half of the entries."""


def category_embeddings(names: Sequence[str] | None, classes: int) -> Tensor:
    """The embedding of every class, `(classes, dim)`, with entries of mean square 1.

    Args:
        names: of the classes, put into a prompt and encoded as sentences. None encodes the indices instead: random
            directions, always the same, which need no text encoder.
        classes: how many logits the teacher has.

    Raises:
        InputError: the number of names is not that of the logits, or two embeddings are the same.
        MissingExtraError: there are names, but no text encoder is installed.
    """
    if names is None:
        vectors = torch.randn(classes, INDEX_SIZE, generator=torch.Generator().manual_seed(0))
    elif len(names) != classes:
        raise InputError(f"{len(names)} class names for {classes} logits: give one name per logit, in their order")
    else:
        vectors = embed_sentences([f"a photo of a {name}" for name in names])
    for i in range(classes):
        for j in range(i):
            if torch.allclose(vectors[i], vectors[j], atol=1e-5):
                raise InputError(
                    f"the names of classes {j} and {i} have the same embedding, so a generator could not tell them "
                    "apart: give each class a name of its own"
                )
    return vectors / vectors.square().mean(1, keepdim=True).sqrt()


class Drawn(NamedTuple):
    """What is drawn for each sample: its class and its source of noise, both `(batch,)`, and noise `(batch, dim)`."""

    labels: Tensor
    source: Tensor
    noise: Tensor


class CategoryNoise(nn.Module):
    """Latent vectors of classes: embeddings, diffused by noise of several distributions, and mixed.

        e = e_c + M_n * q,   q ~ source n, elementwise;   latent = Linear(BatchNorm(e))

    Args:
        embeddings: `(classes, dim)`.
        sources: names of the distributions, from `SOURCES`.
        magnitudes: M_n, one per source, in units of the embeddings' root mean square.
        latent: size of the latent vectors.
        learn: whether M_n, then a vector, is learned with the generator.

    Raises:
        InputError: an unknown source, or not one magnitude per source.
    """

    def __init__(
        self, embeddings: Tensor, sources: Sequence[str], magnitudes: Sequence[float], latent: int, learn: bool = False
    ):
        super().__init__()
        self.sources = tuple(sources)
        self.register_buffer("embeddings", embeddings)
        self.embeddings: Tensor
        spread = torch.tensor([float(m) for m in magnitudes])[:, None].repeat(1, embeddings.shape[1])
        self.magnitudes = nn.Parameter(spread, requires_grad=learn)
        self.mix = nn.Sequential(
            nn.BatchNorm1d(embeddings.shape[1], track_running_stats=False), nn.Linear(embeddings.shape[1], latent)
        )

    def draw(self, count: int) -> Drawn:
        """Classes, sources and noise, each class and source with the same probability."""
        labels, source = self._choose(len(self.embeddings), count), self._choose(len(self.sources), count)
        return Drawn(labels, source, self.noise(source))

    def pairs(self, count: int) -> tuple[Drawn, Tensor]:
        """Two samples of each of `count` drawn classes, from different sources, and who is whose positive.

        Positives, `(2 * count, 2 * count)`, are samples of one class from different sources.
        """
        labels, first, _ = self.draw(count)
        kinds = len(self.sources)
        second = (first + 1 + self._choose(kinds - 1, count)) % kinds
        labels, source = labels.repeat(2), torch.cat([first, second])
        positives = (labels[:, None] == labels) & (source[:, None] != source)
        return Drawn(labels, source, self.noise(source)), positives

    def noise(self, source: Tensor) -> Tensor:
        """Noise of mean 0 and variance 1, `(batch, dim)`, from the source of each sample, `(batch,)`."""
        shape = torch.Size((len(source), self.embeddings.shape[1]))
        drawn = torch.stack([SOURCES[name](shape, source.device) for name in self.sources])
        return drawn[source, torch.arange(len(source), device=source.device)]

    def diffused(self, drawn: Drawn) -> Tensor:
        """Embeddings with noise, `(batch, dim)`."""
        return self.embeddings[drawn.labels] + self.magnitudes[drawn.source] * drawn.noise

    def forward(self, drawn: Drawn) -> Tensor:
        return self.mix(self.diffused(drawn))

    def _choose(self, kinds: int, count: int) -> Tensor:
        return torch.randint(kinds, (count,), device=self.embeddings.device)

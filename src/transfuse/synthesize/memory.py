"""Memories of earlier made images: a ring of batches, or a generative model that is trained along."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.run import Run
from transfuse.losses import Term, mean_absolute_error
from transfuse.synthesize.base import image_batch
from transfuse.synthesize.generator import Generator, Pool

SHARE = 8
"""One image of the memory for so many new ones."""


class RingMemory(nn.Module):
    """The first eighth of the images of every so many rounds, in a ring of slots.

    Args:
        slots: batches that are remembered.
        every: rounds between two of them.
    """

    def __init__(self, slots: int, every: int):
        super().__init__()
        self.every, self.pool = every, Pool(slots)

    def recall(self, batch: Batch, run: Run) -> Tensor | None:
        """This micro-batch's share of a slot, each slot with the same probability; None while the ring is empty."""
        if not len(self.pool):
            return None
        # All processes and micro-batches of an update look at one slot.
        slot = self.pool.slot(run.shared_rng("slot", run.rep))
        first, last = int(batch.index[0]) // SHARE, (int(batch.index[-1]) + 1) // SHARE
        return slot[first : max(last, first + 1)]

    def due(self, run: Run) -> bool:
        """Whether this round's images are to be remembered."""
        return (run.clock.step + 1) % self.every == 0

    def store(self, images: Tensor) -> None:
        """Remember the first eighth of the images of an update."""
        self.pool.push(images[: max(1, len(images) // SHARE)])


class GenerativeMemory(nn.Module):
    """A variational autoencoder of made images, which learns from new ones and from its own.

        loss = mean |x' - x| + mean |T(x') - T(x)| + 1e-5 * KL(q(z | x) || N(0, I)),  x' the reconstruction of x

    Args:
        shape, width, limits: as of the generator.
        latent: size of a code.
    """

    DIVERGENCE = 1e-5

    def __init__(self, shape: Sequence[int], width: int, limits: Sequence[float], latent: int = 100):
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(
            nn.Conv2d(shape[0], width, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.LazyLinear(2 * latent),
        )
        self.encoder(torch.zeros(1, *shape))
        self.decoder = Generator(shape, latent, width, limits)
        self.register_buffer("rounds", torch.tensor(0))
        self.rounds: Tensor

    def loss(self, new: Tensor, run: Run) -> dict[str, Term]:
        """What it learns from half a micro-batch of new images, and an eighth of its own."""
        own = self.decoder(torch.randn(max(2, len(new) // SHARE), self.latent, device=new.device)).detach()
        images = torch.cat([new[: max(1, len(new) // 2)], *([own] if self.rounds else [])])
        centre, spread = self.encoder(images).chunk(2, dim=1)
        again = self.decoder(centre + (0.5 * spread).exp() * torch.randn_like(centre))
        with torch.no_grad():
            wanted = run("source", image_batch(images), grad=False, own=True).logits
        said = run("source", image_batch(again), own=True).logits
        divergence = 0.5 * (centre.square() + spread.exp() - 1 - spread).sum(1)
        return {
            "image": Term(mean_absolute_error(again, images).mean()),
            "answer": Term(mean_absolute_error(said, wanted).mean()),
            "divergence": self.DIVERGENCE * Term(divergence.mean()),
        }

    def sample(self, count: int) -> Tensor:
        """Codes `(count, latent)`; decoded they are remembered images."""
        return torch.randn(count, self.latent, device=self.rounds.device)

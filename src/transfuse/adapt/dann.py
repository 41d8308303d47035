"""DANN: features in which a discriminator cannot tell the domains apart."""

from __future__ import annotations

import math

from torch import nn

from transfuse.adapt.base import Adaptation
from transfuse.adapt.discriminator import discriminator, flat
from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.losses import Term, domain_cross_entropy, reverse_gradient


class DANN(Adaptation):
    """Train a discriminator of domains on the features, and the features against it.

        loss     = CE(source labels) + mean_s -log(1 - D(R(f_s))) + mean_t -log D(R(f_t))
        R(f)     = f, with gradient -strength
        strength = 2 / (1 + exp(-gamma * progress)) - 1

    f are the features at `layer`, D the discriminator's probability of the target domain, R the reversal of
    gradients. The strength rises from 0 towards 1, so that noise in the early discriminator does no harm; the
    discriminator itself always learns at full strength. It is gone from the deployed model. The authors train by
    SGD with momentum and a rate that falls as (1 + 10 progress)**-0.75: `schedule="inverse"`.

    Args:
        layer: tap whose features are aligned.
        hidden: width of the discriminator's two hidden layers.
        gamma: how fast the strength rises.

    Raises:
        InputError: the source has no labels, `hidden` or `gamma` is not positive.
        ShapeError: source labels are out of the model's range, or the domains' inputs differ in shape.

    Source: Ganin et al., JMLR 2016, arXiv:1505.07818.
    """

    card = Card(
        paper="Ganin et al., JMLR 2016",
        arxiv="1505.07818",
        carries="data",
        teacher="data",
        data="unlabelled",
        tasks=("classification",),
    )

    def __init__(self, layer: str = "penultimate", hidden: int = 1024, gamma: float = 10.0):
        super().__init__()
        if hidden < 1 or gamma <= 0:
            raise InputError(f"DANN: hidden is {hidden} and gamma {gamma}, both must be positive")
        self.layer, self.hidden, self.gamma = layer, hidden, gamma
        self.discriminator: nn.Module | None = None

    def wants(self) -> dict[str, list[str]]:
        return {"target": [self.layer]}

    def build(self, source: Outputs, target: Outputs) -> None:
        self.discriminator = discriminator(flat(source, self.layer).shape[1], self.hidden)

    def loss(self, source: Outputs, target: Outputs, source_batch: Batch, target_batch: Batch, clock: Clock) -> Losses:
        assert self.discriminator is not None
        strength = 2 / (1 + math.exp(-self.gamma * clock.fraction)) - 1
        here, there = (self.discriminator(reverse_gradient(flat(o, self.layer), strength)) for o in (source, target))
        return {
            "source domain": Term.of(domain_cross_entropy(here, target=False), unit="source/sample"),
            "target domain": Term.of(domain_cross_entropy(there, target=True)),
        }

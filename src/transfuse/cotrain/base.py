"""The family of co-training: several tasks, languages or data sets teach one model at the same time.

The caller gives `data=` a dict of pools by name. A method of this family says in which shares they are mixed,
`shares(run)`; the loss is the cross-entropy on whatever is labelled, the same for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.labels import labels_term
from transfuse.core.method import Method
from transfuse.core.mixture import Mixture, Shares
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run


class Cotraining(Method):
    """Base of the family. `"target"` is the model; its only stream, `"data"`, is the mixture of the caller's pools.

        loss = CE(labels, target), mean over labelled samples or tokens of the batch, whatever pool they are from

    Raises:
        InputError: the data is not several pools, or the length of the training is not given in steps.
    """

    family = "cotrain"
    uses_source = False

    def shares(self, run: Run) -> Shares:
        """The probability of each of the caller's pools at each position, see :data:`transfuse.core.mixture.Shares`."""
        raise NotImplementedError

    def loss(self, target: Outputs, batch: Batch, run: Run) -> Losses:
        """The terms of one micro-batch."""
        if batch.labels is None:
            raise InputError(f"{type(self).__name__} learns from labels, and a pool has none")
        return {"labels": labels_term(target.logits, batch)}

    def losses(self, batches: Batches, run: Run) -> Losses:
        return self.loss(run("target", batches["data"]), batches["data"], run)

    def setup(self, run: Run, sample: Batch | None) -> None:
        if len(run.data) < 2:
            raise InputError(
                f"{type(self).__name__} mixes several pools, found {', '.join(run.data) or 'none'}: "
                'pass data={"one": ..., "other": ...}'
            )
        self.mixture(run)

    def mixture(self, run: Run) -> Mixture:
        """The caller's pools in this method's shares."""
        return Mixture(run.data, self.shares(run))

    def stage(self, i: int, run: Run) -> Stage:
        return Stage({"data": self.mixture(run)}, [Phase("target", self.losses, run["target"].parameters())])


def probabilities(what: str, given: Mapping[str, float], pools: Mapping[str, Any]) -> Tensor:
    """Shares by the names of the pools, `(pools,)`; a pool that is not named has none.

    Raises:
        InputError: a name is no pool, a share is negative, or they do not add up to 1.
    """
    if unknown := [name for name in given if name not in pools]:
        raise InputError(f"{what} names {', '.join(map(repr, unknown))}, the pools are {', '.join(pools)}")
    found = torch.tensor([float(given.get(name, 0.0)) for name in pools], dtype=torch.float64)
    if bool((found < 0).any()) or abs(float(found.sum()) - 1) > 1e-6:
        raise InputError(f"{what} is {dict(given)}: shares must not be negative and must add up to 1")
    return found


class StaticMixture(Cotraining):
    """Mix the pools in shares that stay the same: the baseline of the family.

        p(pool) = mix[pool] at every position

    Args:
        mix: shares by the names of the pools, adding up to 1.

    Raises:
        InputError: they name no pool, are negative, or do not add up to 1.
    """

    card = Card(
        paper="training on a fixed mixture",
        carries="data",
        teacher="none",
        data="labelled",
        tasks=("classification", "language-model", "token-classification", "segmentation"),
        control=True,
    )

    def __init__(self, mix: Mapping[str, float]):
        super().__init__()
        self.mix = dict(mix)

    def shares(self, run: Run) -> Shares:
        constant = probabilities("StaticMixture: mix", self.mix, run.data)
        return lambda at: constant.expand(len(at), -1)

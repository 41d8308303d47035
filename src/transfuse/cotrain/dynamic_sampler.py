"""DynamicSampler: the mixture of data slides from what the model knows to what it is to become (ChatFlow)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from transfuse.core.batch import Batch, token_ids
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, nearest
from transfuse.core.mixture import Shares, interpolated
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.core.run import Run
from transfuse.cotrain.base import Cotraining, probabilities
from transfuse.losses import IGNORE, Term, cross_entropy, next_token

GROWTH: dict[str, Callable[[Tensor, float], Tensor]] = {
    "linear": lambda u, start: start + (1 - start) * u,
    "root": lambda u, start: (u * (1 - start**2) + start**2).sqrt(),
    "cosine": lambda u, start: (1 - (math.pi * u).cos()) / 2,
}
"""How far along the mixture is, from the share of the growth that has passed; `start` is where it begins."""


class DynamicSampler(Cotraining):
    """Slide the mixture of pools from one to another within a single training, without a stage boundary.

        p(t) = (1 - g(u)) start + g(u) end,     u = min(1, t / T_grow),   t counts samples

        g linear:  lam0 + (1 - lam0) u
        g root:    sqrt(u (1 - lam0^2) + lam0^2)        (competence)
        g cosine:  (1 - cos(pi u)) / 2

    With `middle` the mixture goes there first: start, middle, end at equal parts of g. The pool is drawn for every
    sample. One optimiser and one schedule of the learning rate span the whole transition.

    Text with a prompt (positions that the data labels -100) is taught by its answer alone, or, with
    `prompt="fading"`, by its prompt as well, with a weight 1 - g(u) that falls to 0:

        loss = CE(answers) + (1 - g(u)) CE(prompts),   each a mean over its own tokens

    Args:
        start, end, middle: shares by the names of the pools; one that is not named has none.
        grow: T_grow, as the part of the training after which the mixture stays at `end`; 0 is there at once.
        growth: `"linear"`, `"root"` or `"cosine"`.
        initial: lam0, where the growth begins, in [0, 1).
        prompt: `"masked"` or `"fading"`.

    Raises:
        InputError: shares name no pool, are negative or do not add up to 1; an argument is out of range; the training
            is not given in steps.

    Source: Li et al., ICASSP 2024, arXiv:2405.10626. The paper's growth function could not be read; linear and root
    are those of the curriculum literature (Wang, Chen & Zhu, 2021) that its symbols point to.
    """

    card = Card(
        paper="Li et al. (ChatFlow), ICASSP 2024",
        arxiv="2405.10626",
        sheet=82,
        carries="data",
        teacher="none",
        data="labelled",
        tasks=("classification", "language-model", "token-classification", "segmentation"),
    )

    def __init__(
        self,
        start: Mapping[str, float],
        end: Mapping[str, float],
        middle: Mapping[str, float] | None = None,
        grow: float = 1.0,
        growth: str = "linear",
        initial: float = 0.0,
        prompt: str = "masked",
    ):
        super().__init__()
        if growth not in GROWTH:
            raise InputError(f"DynamicSampler: unknown growth {growth!r}: {nearest(growth, GROWTH)}")
        if prompt not in ("masked", "fading"):
            raise InputError(f"DynamicSampler: prompt is {prompt!r}, it is 'masked' or 'fading'")
        if not 0 <= grow <= 1 or not 0 <= initial < 1:
            raise InputError(f"DynamicSampler: grow is {grow}, in [0, 1], and initial is {initial}, in [0, 1)")
        self.start, self.end, self.middle = dict(start), dict(end), None if middle is None else dict(middle)
        self.grow, self.growth, self.initial, self.prompt = grow, growth, initial, prompt
        if prompt == "fading":
            self.units = {"prompt": lambda batch: prompt_labels(batch).ne(IGNORE).sum()}

    def shares(self, run: Run) -> Shares:
        training = run.training
        if training is None or training.steps is None:
            raise InputError(
                "DynamicSampler: a mixture has no epochs, and slides to where the training ends: say steps=..."
            )
        anchors = [
            probabilities(f"DynamicSampler: {name}", given, run.data)
            for name, given in (("start", self.start), ("middle", self.middle), ("end", self.end))
            if given is not None
        ]
        length = self.grow * training.steps * training.batch_size
        return interpolated(anchors, lambda u: GROWTH[self.growth](u, self.initial), length)

    def loss(self, target: Outputs, batch: Batch, run: Run) -> Losses:
        terms = super().loss(target, batch, run)
        if self.prompt == "fading":
            labels = prompt_labels(batch)
            term = Term.of(cross_entropy(target.logits, labels), labels != IGNORE, "prompt")
            terms["prompt"] = (1 - self.progress(run.clock)) * term
        return terms

    def progress(self, clock: Clock) -> float:
        """g at the update at hand."""
        u = 1.0 if self.grow == 0 else min(1.0, clock.fraction / self.grow)
        return float(GROWTH[self.growth](torch.tensor(u), self.initial))


def prompt_labels(batch: Batch) -> Tensor:
    """The next token where the data has no label for it although it is no padding, else -100, `(batch, tokens)`."""
    tokens = token_ids(batch)
    padding = batch.inputs.get("attention_mask") if isinstance(batch.inputs, Mapping) else None
    if padding is not None:
        tokens = tokens.masked_fill(~padding.bool(), IGNORE)
    labels = next_token(tokens)
    return labels if batch.labels is None else labels.masked_fill(batch.labels != IGNORE, IGNORE)

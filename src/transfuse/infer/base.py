"""The family of inference: frozen models answer together, token by token, and nothing is trained.

A method of this family says how much each expert counts at every token (`weights`). What comes back from a transfer is
a :class:`~transfuse.infer.fused.FusedModel`, which is read and decoded like one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.errors import CapabilityError, InputError
from transfuse.core.method import Method
from transfuse.core.outputs import full_precision
from transfuse.core.run import Run
from transfuse.core.teacher import Recorded

if TYPE_CHECKING:
    from transfuse.infer.fused import FusedModel

BASE = "source.base"
AT_ONCE = 2**24
"""Numbers of `(rows, experts, vocabulary)` that are worked on at once; a search keeps a few tensors of that size."""


class Fused(NamedTuple):
    """What models say together about the next tokens, one row per position.

    Attributes:
        logits: `(rows, vocabulary)`; -inf at tokens that one of the models rules out.
        alpha: `(rows, experts)`, how much each expert counted.
        residuals: `(rows, experts, 2)` in nats: how much further the large model was moved than the expert has moved
            from its base, as KL(fused || large) - KL(expert || base) and KL(large || fused) - KL(base || expert).
    """

    logits: Tensor
    alpha: Tensor
    residuals: Tensor


@dataclass(frozen=True)
class Moves:
    """How far experts have moved from their base, and how far the same shift moves the large model.

    Attributes:
        log_p: `(rows, vocabulary)` log-probabilities of the large model.
        shifts: `(rows, experts, vocabulary)` expert's logits less the base's, less their mean under the large model.
        targets: `(rows, experts, 2)` KL(expert || base) and KL(base || expert), in nats.
    """

    log_p: Tensor
    shifts: Tensor
    targets: Tensor

    def residuals(self, shift: Tensor) -> Tensor:
        """Of the large model moved by a shift `(rows, vocabulary)`: `(rows, experts, 2)`."""
        return divergences(self.log_p, shift)[:, None] - self.targets

    def objective(self, shift: Tensor) -> Tensor:
        """The sum of squared residuals, `(rows,)`: 0 where the large model moves exactly as far as every expert."""
        return self.residuals(shift).square().sum((1, 2))

    def total(self, alpha: Tensor) -> Tensor:
        """The weighted sum of the shifts, `(rows, vocabulary)`, for weights `(rows, experts)`."""
        return torch.einsum("rt,rtv->rv", alpha, self.shifts)


class Fusion(Method):
    """Base of the family. `"target"` is the large model; `source={"base": small, "tuned": expert, ...}` the others.

    Any number of experts, each tuned from the same base. In a recipe, which numbers its sources, the base is the first.
    """

    family = "infer"
    needs_data = False
    trains = False

    def weights(self, moves: Moves) -> Tensor:
        """How much each expert counts in each row, `(rows, experts)`."""
        raise NotImplementedError

    def fuse(self, large: Tensor, base: Tensor, experts: Sequence[Tensor]) -> Fused:
        """Put logits over one vocabulary together, each `(rows, vocabulary)`; every row has weights of its own.

        A token that one model rules out (-inf) is ruled out, and counts in no divergence.
        """
        rows = max(1, AT_ONCE // (large.shape[1] * (len(experts) + 2)))
        parts = [self._fuse(*part) for part in zip(*(x.split(rows) for x in (large, base, *experts)), strict=True)]
        return Fused(*(torch.cat(found) for found in zip(*parts, strict=True)))

    def _fuse(self, large: Tensor, base: Tensor, *experts: Tensor) -> Fused:
        large, base, *tuned = (full_precision(x) for x in (large, base, *experts))
        out = torch.stack([x == -torch.inf for x in (large, base, *tuned)]).any(0)
        log_p, log_q = (x.masked_fill(out, -torch.inf).log_softmax(-1) for x in (large, base))
        differences = [(x - base).masked_fill(out, 0) for x in tuned]
        targets = torch.stack([divergences(log_q, centred(log_q, d)) for d in differences], 1)
        moves = Moves(log_p, torch.stack([centred(log_p, d) for d in differences], 1), targets)
        alpha = self.weights(moves)
        fused = large + torch.einsum("rt,rtv->rv", alpha, torch.stack(differences, 1))
        return Fused(fused.masked_fill(out, -torch.inf), alpha, moves.residuals(moves.total(alpha)))

    def setup(self, run: Run, sample: Batch | None) -> None:
        name = type(self).__name__
        if run.task != "language-model":
            raise InputError(f"{name} fuses what language models say about the next token, this is {run.task}")
        if run.shuffled:
            raise InputError(
                f"{name} reads sources while it answers, so there is no shuffled arm: compare with alpha 0"
            )
        base = BASE if BASE in run else "source.0"
        experts = [role for role in run.sources if role != base]
        if base not in run or not experts:
            raise InputError(
                f"{name} needs the small model and at least one expert tuned from it, found {', '.join(run.sources)}: "
                'pass source={"base": small, "expert": tuned}'
            )
        for role in run.sources:
            if isinstance(run[role], Recorded):
                raise CapabilityError(f"{name} runs its sources on every new text, and {role!r} is a store of answers")
        # In a tuple, for they are no part of the method: nobody shall train or save them with it.
        self._helpers = (run[base], {role.removeprefix("source."): run[role] for role in experts})

    def begin_stage(self, i: int, run: Run) -> bool:
        return False  # there is nothing to train

    def deploy(self, target: nn.Module) -> FusedModel:
        from transfuse.infer.fused import FusedModel

        return FusedModel(target, *self._helpers, self)


def divergences(log_p: Tensor, shift: Tensor) -> Tensor:
    """How far a shift of the logits moves a distribution P to P~: KL(P~ || P) and KL(P || P~), `(rows, 2)` in nats.

    With the log-partition A = log E_P[exp(shift)], and shifts whose mean under P is 0, they are E_P~[shift] - A and A.
    """
    moved = log_p + shift
    top = moved.amax(-1, keepdim=True)
    weights = (moved - top).exp()  # once for both, for a search does little else
    total = weights.sum(-1)
    partition = total.log() + top[:, 0]
    there = (weights * shift).sum(-1) / total - partition
    return torch.stack([there, partition], -1).clamp(min=0)


def centred(log_p: Tensor, shift: Tensor) -> Tensor:
    """A shift less its mean under P: constants on logits change nothing, and differences stay small."""
    return shift - (log_p.exp() * shift).sum(-1, keepdim=True)

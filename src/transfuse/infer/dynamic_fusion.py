"""Dynamic logits fusion: at every step a large model is moved as far from itself as small experts moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.infer.base import Fusion

MOST, CELLS, NARROWINGS = 2.0, 20, 24
GOLDEN = (5**0.5 - 1) / 2
LEAST_GAIN = 1e-10


class DynamicFusion(Fusion):
    """Choose at every token how much of each expert a large model takes.

    With P the large model, Q the small base, Q_t its experts and P~ = softmax(large + sum_t alpha_t (expert_t - base)):

        alpha = argmin_[0, 2] sum_t (KL(P~ || P) - KL(Q_t || Q))**2 + (KL(P || P~) - KL(Q || Q_t))**2

    at every position and for every text on its own. One expert: a grid of 0.1, then golden section in the best cell;
    of equal ones the smallest alpha. Several: by default one expert per step, the best of them alone; `"joint"` moves
    all, by turns, from there and from the large model as it is.

    Nothing is trained, no data is needed, and the large model is only run. Decoding costs one pass of every model.

    Args:
        experts: `"one"` per step, or `"joint"`.

    Raises:
        InputError: fewer than two sources, or an unknown way of taking experts.
        VocabularyError: the models mean different tokens.

    Source: Fan, Lu, Wei, Tian, Qu, Chen & Cheng, NeurIPS 2024, arXiv:2406.15480.
    """

    card = Card(
        paper="Fan, Lu, Wei, Tian, Qu, Chen & Cheng, NeurIPS 2024",
        arxiv="2406.15480",
        sheet=122,
        carries="outputs",
        teacher="full",
        data="none",
        tasks=("language-model",),
    )

    def __init__(self, experts: Literal["one", "joint"] = "one"):
        super().__init__()
        if experts not in ("one", "joint"):
            raise InputError(f"DynamicFusion: experts is {experts!r}, it must be 'one' (per step) or 'joint'")
        self.experts = experts

    def fuse(self, large: Tensor, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        alpha = self.weights(large, base, experts)
        moves = torch.stack([expert.log_softmax(-1) - base.log_softmax(-1) for expert in experts])
        return large + (alpha[..., None] * moves).sum(0)

    def weights(self, large: Tensor, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """The weight of each expert at each position, `(experts, rows)`.

        Args:
            large, base: logits `(rows, vocabulary)`.
            experts: the same of each expert.
        """
        problem = Distance(large, base, experts)
        zero = large.new_zeros(len(experts), len(large))
        alone = []
        for t in range(len(experts)):
            alpha = zero.clone()
            alpha[t] = problem.best(zero, t)
            alone.append(alpha)
        values = torch.stack([problem(alpha) for alpha in alone])
        best = torch.stack(alone, 1).gather(1, values.argmin(0).expand(len(experts), 1, -1))[:, 0]
        if self.experts == "one" or len(experts) == 1:
            return best
        found = [self._by_turns(problem, start) for start in (best, zero)]
        return torch.where(problem(found[1]) < problem(found[0]) - LEAST_GAIN, found[1], found[0])

    def _by_turns(self, problem: Distance, alpha: Tensor) -> Tensor:
        for _ in range(3):
            for t in range(len(alpha)):
                moved = alpha.clone()
                moved[t] = problem.best(alpha, t)
                alpha = torch.where(problem(moved) < problem(alpha) - LEAST_GAIN, moved, alpha)
        return alpha


class Distance:
    """How far the large model's move from itself is from the experts' moves from their base, in both divergences.

    Args:
        large, base, experts: logits, as in :meth:`DynamicFusion.weights`.
    """

    def __init__(self, large: Tensor, base: Tensor, experts: Sequence[Tensor]):
        self.log_p, log_q = large.log_softmax(-1), base.log_softmax(-1)
        self.p = self.log_p.exp()
        log_t = torch.stack([expert.log_softmax(-1) for expert in experts])
        self.moves = log_t - log_q
        self.forward = (log_t.exp() * self.moves).sum(-1)
        """KL(Q_t || Q), `(experts, rows)`."""
        self.reverse = -(log_q.exp() * self.moves).sum(-1)

    def divergences(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """KL(P~ || P) and KL(P || P~) at weights `(experts, rows)`, each `(rows,)`, by the log-partition."""
        move = (alpha[..., None] * self.moves).sum(0)
        moved = self.log_p + move
        partition = moved.logsumexp(-1)
        there = (moved - partition[:, None]).exp()
        return (there * move).sum(-1) - partition, partition - (self.p * move).sum(-1)

    def __call__(self, alpha: Tensor) -> Tensor:
        """The objective, `(rows,)`."""
        forward, reverse = self.divergences(alpha)
        return ((forward - self.forward) ** 2 + (reverse - self.reverse) ** 2).sum(0)

    def best(self, alpha: Tensor, t: int) -> Tensor:
        """The weight of expert t with the others as they are, `(rows,)`."""

        def value(weight: Tensor) -> Tensor:
            tried = alpha.clone()
            tried[t] = weight
            return self(tried)

        grid = torch.linspace(0.0, MOST, CELLS + 1, dtype=alpha.dtype, device=alpha.device)
        values = torch.stack([value(g.expand_as(alpha[t])) for g in grid])
        at = (values <= values.amin(0) + LEAST_GAIN).float().argmax(0)  # the first, so the smallest, of equal ones
        found = grid[at]
        low, high = (found - MOST / CELLS).clamp(min=0.0), (found + MOST / CELLS).clamp(max=MOST)
        for _ in range(NARROWINGS):
            left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
            better = value(left) <= value(right)
            low, high = torch.where(better, low, left), torch.where(better, right, high)
        refined = (low + high) / 2
        return torch.where(value(refined) < values.gather(0, at[None])[0] - LEAST_GAIN, refined, found)

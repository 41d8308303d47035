"""Dynamic logit fusion: at every token a large model moves as far as small experts have moved from their base."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.infer.base import Fusion, Moves

LARGEST = 2.0
CELLS = 20
"""Of the grid on [0, LARGEST]."""
REFINEMENTS = 20
"""Of golden section within two cells: alpha is then known to 1e-5."""
STEPS = 20
"""Of descent in the box."""
EQUAL = 1e-10
"""Differences of the objective, in nats squared, that do not matter."""
GOLDEN = (5**0.5 - 1) / 2


class DynamicFusion(Fusion):
    """Move a large model by what small experts have learned, at each token as far as they have moved themselves.

        fused(alpha) = large + sum over experts t of alpha_t * (expert_t - base)
        alpha* = argmin over [0, 2] of sum over t of (KL(fused || large) - KL(expert_t || base))**2
                                                   + (KL(large || fused) - KL(base || expert_t))**2

    over the whole vocabulary, for every row and step anew. One expert: a grid of step 0.1, refined by golden section
    around its best point; of equal ones the smallest. All models read the same tokens by the same ids, and none is
    trained or changed. Where the large model is the base itself, alpha is 1 and the answer is the expert's.

    Args:
        experts: where there are several, `"one"` per step, that which alone fits all best, a line search for each; or
            `"joint"`, the best weights in [0, 2]^T, by descent from every expert at its best, from every
            expert at weight 1, and from all at weight 1. There are two divergences to meet, so with three or more
            experts many weights may be as good as each other.

    Raises:
        InputError: an unknown way of taking experts.
        VocabularyError: (at the first text) the models mean different tokens.

    Source: Fan et al., NeurIPS 2024, arXiv:2406.15480.
    """

    card = Card(
        paper="Fan et al., NeurIPS 2024",
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

    def weights(self, moves: Moves) -> Tensor:
        rows, count, _ = moves.shifts.shape
        none = moves.log_p.new_zeros(rows, count)
        alone = [line_search(moves, none, t) for t in range(count)]
        if count == 1 or self.experts == "one":
            return best(moves, alone)
        ones = [none.index_fill(1, torch.tensor([t], device=none.device), 1) for t in range(count)]
        starts = [*alone, *ones, none + 1]
        side_by_side = Moves(*(x.repeat(len(starts), *[1] * (x.dim() - 1)) for x in vars(moves).values()))
        return best(moves, [*alone, *descend(side_by_side, torch.cat(starts)).chunk(len(starts))])


def line_search(moves: Moves, alpha: Tensor, expert: int) -> Tensor:
    """The weights `(rows, experts)` with the best value for one expert, the others as they are."""
    along = moves.shifts[:, expert]
    rest = moves.total(alpha) - alpha[:, expert, None] * along

    def value(at: Tensor) -> Tensor:
        return moves.objective(rest + at[:, None] * along)

    grid = torch.arange(CELLS + 1, device=rest.device, dtype=rest.dtype) * (LARGEST / CELLS)
    values = torch.stack([value(at.expand(len(rest))) for at in grid])
    slack = resolution(moves)
    first = (values <= values.amin(0) + slack).int().argmax(0)
    found, lowest = grid[first], values.gather(0, first[None])[0]

    low, high = (found - LARGEST / CELLS).clamp(min=0), (found + LARGEST / CELLS).clamp(max=LARGEST)
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = value(left), value(right)
    for _ in range(REFINEMENTS):
        leftwards = at_left <= at_right
        low, high = torch.where(leftwards, low, left), torch.where(leftwards, right, high)
        new = torch.where(leftwards, high - GOLDEN * (high - low), low + GOLDEN * (high - low))
        at_new = value(new)
        left, right = torch.where(leftwards, new, right), torch.where(leftwards, left, new)
        at_left, at_right = torch.where(leftwards, at_new, at_right), torch.where(leftwards, at_left, at_new)
    refined = (low + high) / 2
    found = torch.where(value(refined) < lowest - slack, refined, found)
    return alpha.index_copy(1, torch.tensor([expert], device=alpha.device), found[:, None])


def descend(moves: Moves, alpha: Tensor) -> Tensor:
    """The lowest point of the objective near some weights, within the box: damped Gauss-Newton steps.

    All experts share the two divergences of the large model, so the objective is least where these are nearest to the
    means of the experts' own. With covariance C and mean m of the shifts under the fused distribution, their slopes in
    alpha are C alpha and m. (Coordinate descent crawls along the curve on which one of the two divergences is met.)
    """
    unit = torch.eye(alpha.shape[1], dtype=alpha.dtype, device=alpha.device)
    damping, lowest = torch.ones_like(alpha[:, :1, None]), moves.objective(moves.total(alpha))
    for _ in range(STEPS):
        shift = moves.total(alpha)
        fused = (moves.log_p + shift).softmax(-1)[:, None]
        mean = (fused * moves.shifts).sum(-1)
        covariance = (fused * moves.shifts) @ moves.shifts.mT - mean[:, :, None] * mean[:, None]
        slopes = torch.stack([(covariance @ alpha[..., None]).squeeze(-1), mean], 1)
        gradient = (moves.residuals(shift).mean(1)[:, None] @ slopes).squeeze(1)
        free = ~((alpha <= 0) & (gradient > 0) | (alpha >= LARGEST) & (gradient < 0))
        slopes, gradient = slopes * free[:, None], gradient * free
        curvature = slopes.mT @ slopes
        size = curvature.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None] + torch.finfo(alpha.dtype).tiny
        step = torch.linalg.solve(curvature / size + damping * unit, gradient / size[:, 0])
        new = (alpha - step).clamp(0, LARGEST)
        value = moves.objective(moves.total(new))
        lower = value < lowest
        alpha, lowest = torch.where(lower[:, None], new, alpha), torch.where(lower, value, lowest)
        damping = torch.where(lower[:, None, None], damping / 4, damping * 4).clamp(1e-6, 1e6)
    return alpha


def best(moves: Moves, found: list[Tensor]) -> Tensor:
    """Row by row the weights with the lowest objective; of equally good ones those with the smallest sum."""
    values = torch.stack([moves.objective(moves.total(alpha)) for alpha in found])
    equal = values <= values.amin(0) + resolution(moves).clamp(min=EQUAL)
    sums = torch.stack(found).sum(-1).masked_fill(~equal, torch.inf)
    return torch.stack(found)[sums.argmin(0), torch.arange(len(equal[0]), device=equal.device)]


def resolution(moves: Moves) -> Tensor:
    """Differences of the objective below this are rounding, `(rows,)`."""
    rounding = 64 * torch.finfo(moves.log_p.dtype).eps * (1 + moves.targets.amax((1, 2)))
    return rounding.square()

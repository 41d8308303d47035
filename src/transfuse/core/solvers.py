"""Directions for several objectives at once: from the gradients' inner products to one weight per gradient.

For a phase that combines gradients (`Phase(combine=...)`). A row is the gradient of one objective, a list with a
tensor per parameter; `gram` of m rows is the `(m, m)` matrix C of their inner products. Solvers are functions of C
alone, in float64 on the CPU: the rows, which may have as many entries as the model, are never put together. The
direction is d = sum_i w_i g_i, and (C w)_j = d . g_j says whether a small step along -d lowers objective j.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transfuse.core.errors import DivergenceError, MissingExtraError

Row = Sequence[Tensor]
TOLERANCE = 1e-10
"""Of the constraints of a linear programme whose largest coefficient is 1; the smallest that HiGHS offers."""


class Weights(NamedTuple):
    """What a solver found.

    Attributes:
        weights: `(m,)`, on the simplex.
        dropped: what was given up: 0 nothing, 1 the constraint of the guide, 2 all constraints (uniform weights).
    """

    weights: Tensor
    dropped: int


def gram(rows: Sequence[Row]) -> Tensor:
    """Inner products of gradients, `(m, m)`, summed over the parameters one by one.

    Raises:
        DivergenceError: a gradient is not finite.
    """
    products = [torch.stack([g.flatten() for g in group]).double() for group in zip(*rows, strict=True)]
    total = torch.stack([p @ p.T for p in products]).sum(0).cpu()
    if not total.isfinite().all():
        raise DivergenceError(
            "a gradient that was to be combined is not finite. Lower the learning rate, or train in full precision"
        )
    return total


def weighted(rows: Sequence[Row], weights: Tensor) -> list[Tensor]:
    """The sum of the rows with a weight each."""
    return [
        sum((float(w) * g for w, g in zip(weights[1:], group[1:], strict=True)), float(weights[0]) * group[0])
        for group in zip(*rows, strict=True)
    ]


def guided_descent(gram: Tensor, guide: Tensor, follow: bool) -> Weights:
    """Weights by the linear programme of ParetoDA (Lv et al., NeurIPS 2021), w on the simplex.

        follow:   max  w . a          s.t.  (C w)_j >= 0 at j = argmax a,  (C w)_j >= a_j where a_j <= 0
                                            (everywhere (C w)_j >= 0 if no a_j is positive)
        descend:  max  sum_j (C w)_j  s.t.  (C w)_j >= 0 for all j,  w . a >= min(0, max_j a_j)

    Following makes most of the guide and may raise objectives that agree with it; descending raises none. If the
    constraints of the latter contradict each other, the guide's is dropped; then the shortest vector in the hull of
    the gradients is a solution. Should the solver fail even so, the weights are uniform.

    Args:
        gram: C, `(m, m)`.
        guide: a, `(m,)`: inner products of the gradients with that of the guiding loss.
        follow: which of the two.

    Raises:
        ValueError: there are fewer than two objectives, or shapes do not belong together.
        MissingExtraError: scipy is not installed.
    """
    count = len(gram)
    if count < 2 or gram.shape != (count, count) or guide.shape != (count,):
        raise ValueError(
            f"a direction between m >= 2 objectives needs products (m, m) and a guide (m,), found "
            f"{tuple(gram.shape)} and {tuple(guide.shape)}"
        )
    zero = torch.zeros_like(guide)
    if follow:
        agree = guide > 0
        bounds = torch.where(agree, -torch.inf, guide) if agree.any() else zero
        if agree.any():
            bounds[guide.argmax()] = 0.0
        found = _simplex_maximum(guide, gram, bounds)
    else:
        gain = gram.sum(0)
        least = guide.max().clamp(max=0)
        found = _simplex_maximum(gain, torch.cat([gram, guide[None]]), torch.cat([zero, least[None]]))
        if found is None and (free := _simplex_maximum(gain, gram, zero)) is not None:
            return Weights(free, 1)
    return Weights(torch.full_like(guide, 1 / count), 2) if found is None else Weights(found, 0)


def shortest(gram: Tensor, steps: int = 1000) -> Tensor:
    """Weights on the simplex of the shortest vector in the convex hull of the gradients (MGDA).

    Its direction raises no objective; it is zero where the objectives cannot all be lowered. Frank-Wolfe steps
    between the best and the worst vertex in use (Sener & Koltun, 2018, arXiv:1810.04650, use plain ones).
    """
    weights = torch.full_like(gram[0], 1 / len(gram))
    for _ in range(steps):
        slope = gram @ weights
        low, high = int(slope.argmin()), int(torch.where(weights > 0, slope, -torch.inf).argmax())
        gap = slope[high] - slope[low]
        curvature = gram[low, low] + gram[high, high] - 2 * gram[low, high]
        if gap <= 1e-12 * gram.abs().max() or curvature <= 0:
            break
        step = torch.minimum(gap / curvature, weights[high])
        weights[low] += step
        weights[high] -= step
    return weights


def without_conflicts(gram: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Weights of PCGrad (Yu et al., 2020, arXiv:2001.06782): every gradient loses what points against another one.

    Each objective's gradient is projected onto the normal plane of those it conflicts with, one after the other in
    random order, and the results are added. The weights may exceed 1.
    """
    mixed = torch.eye(len(gram), dtype=gram.dtype)
    for i in range(len(gram)):
        for j in torch.randperm(len(gram), generator=generator).tolist():
            product = mixed[i] @ gram[:, j]
            if j != i and product < 0:
                mixed[i, j] -= product / gram[j, j]
    return mixed.sum(0)


def _simplex_maximum(gain: Tensor, rows: Tensor, bounds: Tensor) -> Tensor | None:
    """The w on the simplex with rows @ w >= bounds and the largest gain . w; None where there is none."""
    active = bounds > -torch.inf
    rows, bounds = rows[active], bounds[active]
    # Gradients may be tiny or huge, tolerances are absolute: every line is brought to the size of 1.
    size = rows.abs().amax(1).clamp(min=torch.finfo(rows.dtype).tiny)
    gain = gain / gain.abs().max().clamp(min=torch.finfo(gain.dtype).tiny)
    found = _linprog()(
        -gain.numpy(),
        A_ub=-(rows / size[:, None]).numpy(),
        b_ub=-(bounds / size).numpy(),
        A_eq=torch.ones(1, len(gain)).double().numpy(),
        b_eq=[1.0],
        bounds=(0, 1),
        method="highs",
        options={"primal_feasibility_tolerance": TOLERANCE, "dual_feasibility_tolerance": TOLERANCE},
    )
    if found.status != 0:
        return None
    weights = torch.as_tensor(found.x, dtype=gain.dtype).clamp(min=0)
    return weights / weights.sum()


def _linprog() -> Any:
    try:
        from scipy.optimize import linprog
    except ImportError as error:
        raise MissingExtraError("scipy", "data", "a direction between several objectives") from error
    return linprog

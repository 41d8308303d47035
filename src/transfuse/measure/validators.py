"""Scores of a model on a domain without labels, to choose epochs and settings of an adaptation by.

Three kinds, none of which can see a label of the target domain:

- of predictions alone, in :data:`VALIDATORS` by name: higher is better;
- of held-out *source* labels, weighted as if the samples came from the target domain: risks, lower is better. They
  hold where only the inputs' distribution differs between the domains (covariate shift);
- the oracle, accuracy on target labels (:func:`transfuse.measure.correct`), is not here: what is chosen by it says
  nothing about adaptation without labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from transfuse import losses
from transfuse.core.errors import InputError, ShapeError
from transfuse.measure.checks import check_logits

ROWS = 1024
"""Rows of a similarity matrix that are held in memory at once."""


def certainty(logits: Tensor) -> float:
    """Mean of 1 - H / log(classes), between 0 and 1. A model that calls everything one class has 1, too.

    Args:
        logits: `(samples, classes)` on the target domain.

    Raises:
        ShapeError, InputError: as :func:`transfuse.measure.correct`.
    """
    logits = check_logits(logits)
    return 1 - float(losses.entropy(logits.double()).mean()) / math.log(logits.shape[1])


def mutual_information(logits: Tensor) -> float:
    """Information maximisation: certain predictions, spread over the classes.

    Between 0 and log(classes), see :func:`transfuse.losses.mutual_information`. It expects classes of about equal size.

    Args:
        logits: `(samples, classes)` on the target domain.

    Raises:
        ShapeError, InputError: as :func:`transfuse.measure.correct`.
    """
    return float(losses.mutual_information(check_logits(logits).double()))


def soft_neighbourhood_density(logits: Tensor, temperature: float = 0.05) -> float:
    """Whether samples lie in dense neighbourhoods of the same prediction (Saito et al., ICCV 2021, arXiv:2108.10860).

        P_i = softmax over j != i of cos(p_i, p_j) / temperature,    SND = mean_i H(P_i)

    p_i are the class probabilities. Between 0 and log(samples - 1), so only scores on equally many samples compare.

    Args:
        logits: `(samples, classes)` on the target domain.
        temperature: of the similarities.

    Raises:
        ShapeError, InputError: as :func:`transfuse.measure.correct`; fewer than two samples, or a temperature of 0.
    """
    logits = check_logits(logits)
    if len(logits) < 2 or temperature <= 0:
        raise InputError(
            f"a neighbourhood needs two samples and a temperature above 0, found {len(logits)}, {temperature}"
        )
    points = F.normalize(logits.double().softmax(1), dim=1)
    total = 0.0
    for start in range(0, len(points), ROWS):
        similar = points[start : start + ROWS] @ points.T / temperature
        own = torch.arange(len(similar), device=similar.device)
        similar[own, start + own] = -torch.inf
        total += float(losses.entropy(similar).sum())
    return total / len(points)


VALIDATORS: Mapping[str, Callable[[Tensor], float]] = {
    "certainty": certainty,
    "mutual_information": mutual_information,
    "soft_neighbourhood_density": soft_neighbourhood_density,
}
"""Scores of target logits by name, as `Method.select` says it; higher is better."""


def density_ratio(source: Tensor, target: Tensor, at: Tensor, decay: float = 1e-3) -> Tensor:
    """How much more probable features are in the target domain than in the source: `(rows of at,)`, with mean near 1.

    By logistic regression between the domains on standardised features:

        w(f) = n_s / n_t * P(target | f) / P(source | f)

    Args:
        source, target: features `(samples, width)` that the regression is fitted to.
        at: features of the samples to weigh, for example those of held-out source data.
        decay: L2 penalty of the regression.

    Raises:
        ShapeError: the widths differ.
    """
    if source.dim() != 2 or not source.shape[1:] == target.shape[1:] == at.shape[1:]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (source, target, at))
        raise ShapeError(f"features must be (samples, width) of one width, found {shapes}")
    both = torch.cat([source, target]).detach().double()
    mean, deviation = both.mean(0), both.std(0).clamp(min=1e-6)
    rows, is_target = (both - mean) / deviation, torch.arange(len(both), device=both.device) >= len(source)
    coefficients = torch.zeros(rows.shape[1] + 1, dtype=torch.float64, device=rows.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([coefficients], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        odds = rows @ coefficients[1:] + coefficients[0]
        value = F.binary_cross_entropy_with_logits(odds, is_target.double()) + decay * coefficients[1:].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(objective)
    found = coefficients.detach()
    odds = (at.detach().double() - mean) / deviation @ found[1:] + found[0]
    return odds.exp() * (len(source) / len(target))


def importance_weighted_risk(values: Tensor, weights: Tensor) -> float:
    """IWV: the mean of `weights * values` (Sugiyama et al., JMLR 2007).

    Args:
        values: losses, or errors, of held-out source samples, `(samples,)`.
        weights: their :func:`density_ratio`, `(samples,)`.

    Raises:
        ShapeError: not one weight per value.
    """
    values, weights = _pairs(values, weights)
    return float((weights * values).mean())


def deep_embedded_risk(values: Tensor, weights: Tensor) -> float:
    """DEV: the importance-weighted risk with the weights as control variate, whose mean should be 1.

        risk = mean(w l) + eta * (mean(w) - 1),    eta = -Cov(w l, w) / Var(w)

    Its variance is smaller than that of :func:`importance_weighted_risk`, which it equals where all weights are equal
    (You et al., ICML 2019).

    Args:
        values, weights: as there.

    Raises:
        ShapeError: not one weight per value.
    """
    values, weights = _pairs(values, weights)
    products = weights * values
    variance = weights.var(correction=0)
    covariance = ((products - products.mean()) * (weights - weights.mean())).mean()
    eta = -covariance / variance if variance > 0 else torch.zeros_like(variance)
    return float(products.mean() + eta * (weights.mean() - 1))


def _pairs(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    if values.dim() != 1 or values.shape != weights.shape or not len(values):
        raise ShapeError(f"one weight per value is needed, found {tuple(values.shape)} and {tuple(weights.shape)}")
    return values.detach().double(), weights.detach().double()

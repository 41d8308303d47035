"""How sure predictions are, and how evenly they are spread over the classes; no labels are needed.

Everything takes logits. Logarithms of probabilities are logits of the same probabilities, so they will do, too.
Nothing here takes the logarithm of a probability that may have become zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transfuse.losses._inputs import at_least_float32
from transfuse.losses.reduction import classes_last


def entropy(logits: Tensor) -> Tensor:
    """Entropy of every prediction, in nats.

    Args:
        logits: `(batch, classes)`, `(batch, tokens, classes)` or `(batch, classes, height, width)`; an impossible
            class may have -inf.

    Returns:
        One value per row, between 0 (certain) and log(classes).

    >>> entropy(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))
    tensor([0.6931, 0.0000])
    """
    return _entropy(_log_probabilities(classes_last(logits)))


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction: log(classes) where the classes are predicted equally often.

    Batch-coupled: a scalar that is not a sum over samples, to be wrapped as `Term(value)`.

    Args:
        logits: `(batch, classes)`.

    Raises:
        ValueError: the logits have not two dimensions, or there are no rows.
    """
    if logits.dim() != 2 or not len(logits):
        raise ValueError(f"predictions must be (batch, classes) with at least one row, found {tuple(logits.shape)}")
    return _entropy(torch.logsumexp(_log_probabilities(logits), 0) - math.log(len(logits)))


def mutual_information(logits: Tensor) -> Tensor:
    """Mutual information between samples and predicted classes: marginal entropy minus mean entropy.

        I = H(mean_x p(x)) - mean_x H(p(x))

    It is log(classes) where every prediction is certain and the classes are equally frequent, and 0 where all
    predictions are equal. Its negative is the information-maximisation loss of Krause et al. (NeurIPS 2010) and of
    SHOT (Liang et al., 2020, arXiv:2002.08546). Batch-coupled; a batch should hold more samples than classes.

    Args:
        logits: `(batch, classes)`.

    Returns:
        Scalar, between 0 and log(classes).

    Raises:
        ValueError: the logits have not two dimensions, or there are no rows.

    >>> mutual_information(torch.tensor([[50.0, 0.0], [0.0, 50.0]]))
    tensor(0.6931)
    """
    return marginal_entropy(logits) - entropy(logits).mean()


def _log_probabilities(logits: Tensor) -> Tensor:
    # Minus infinity times a probability of zero would be NaN; minus a very large number times zero is zero.
    return at_least_float32(logits).log_softmax(-1).clamp(min=-1e30)


def _entropy(log_probabilities: Tensor) -> Tensor:
    return -(log_probabilities.exp() * log_probabilities).sum(-1)

"""How well a model remembers a secret that was planted in its training data."""

from __future__ import annotations

import math

from torch import Tensor

from transfuse.core.errors import InputError, MissingExtraError


def canary_exposure(losses: Tensor, secret: int) -> float:
    """Exposure in bits: log2 of the number of possible secrets, less log2 of the true one's rank.

    0 is a model that finds the secret least likely of all, log2 of their number one that finds it most likely. Equal
    losses share their mean rank, so a model that knows nothing has about 1 bit, not more.

    Args:
        losses: `(secrets,)`, of the text with each possible secret in its place; all of one length in tokens.
        secret: which one was planted.

    Raises:
        InputError: a loss is not finite, or there is no such secret.

    Source: Carlini, Liu, Erlingsson, Kos & Song, USENIX Security 2019, arXiv:1802.08232.
    """
    if losses.dim() != 1 or not 0 <= secret < len(losses):
        raise InputError(f"secret {secret} is none of {tuple(losses.shape)} losses, one for each possible secret")
    if not losses.isfinite().all():
        raise InputError("the loss of a possible secret is not finite, so secrets cannot be ranked")
    own = losses[secret]
    rank = 1 + int((losses < own).sum()) + (int((losses == own).sum()) - 1) / 2
    return math.log2(len(losses)) - math.log2(rank)


def sampled_exposure(losses: Tensor, own: float) -> float:
    """Exposure where there are too many secrets to try: -log2 of the share that a fitted distribution puts below.

    Args:
        losses: `(samples,)`, of the text with secrets drawn at random.
        own: that of the text with the planted one.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    try:
        from scipy.stats import skewnorm
    except ImportError as error:
        raise MissingExtraError("scipy", "data", "sampled_exposure") from error
    return float(-skewnorm.logcdf(own, *skewnorm.fit(losses.double().numpy())) / math.log(2))


def laplace_epsilon(sigma: float, sensitivity: float = 2.0) -> float:
    """The privacy loss of one release of a probability vector with Laplace noise of this scale.

    It is about one token's target given out once, and says nothing about the training data as a whole.

    Args:
        sensitivity: L1 distance by which the vector can change; 2 bounds that of two distributions.
    """
    return math.inf if sigma == 0 else sensitivity / sigma

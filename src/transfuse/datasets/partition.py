"""Deal the samples of one data set out to several parties, unevenly as they are in the world.

Even splits into train, validate and test are in :mod:`transfuse.datasets.splits`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transfuse.core.errors import InputError

TRIES = 100


def dirichlet(labels: Tensor, parts: int, alpha: float, seed: int = 0, fewest: int = 1) -> list[Tensor]:
    """Indices of the samples of each part, with skewed shares of the classes.

    For every class the shares of the parts are drawn from a symmetric Dirichlet distribution: a small `alpha` gives
    each class to few parts, a large one gives all parts the same mix (Hsu et al., 2019, arXiv:1909.06335). Sizes
    differ, too. Every sample is in exactly one part, in random order.

    Args:
        labels: `(samples,)` integers.
        parts: how many parties there are.
        alpha: concentration, above 0.
        seed: of the shares and of the order.
        fewest: drawn again until each part has as many samples.

    Raises:
        InputError: `parts` or `alpha` out of range, or no draw of many gave each part as many as `fewest`.
    """
    if parts < 1 or alpha <= 0:
        raise InputError(f"a partition needs 1 part or more and alpha above 0, found {parts} and {alpha}")
    if fewest * parts > len(labels):
        raise InputError(f"{len(labels)} samples cannot give {parts} parts {fewest} each")
    draws = np.random.default_rng(seed)
    for _ in range(TRIES):
        owner = torch.empty(len(labels), dtype=torch.long)
        for label in labels.unique():
            members = torch.nonzero(labels == label)[:, 0]
            members = members[torch.from_numpy(draws.permutation(len(members)))]
            ends = np.round(np.cumsum(draws.dirichlet([alpha] * parts)) * len(members)).astype(int)
            ends[-1] = len(members)
            for part, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
                owner[members[begin:end]] = part
        if owner.bincount(minlength=parts).min() >= fewest:
            order = torch.from_numpy(draws.permutation(len(labels)))
            return [order[owner[order] == part] for part in range(parts)]
    raise InputError(
        f"{TRIES} draws never gave each of {parts} parts {fewest} of the {len(labels)} samples: raise alpha={alpha}, "
        "or lower fewest"
    )

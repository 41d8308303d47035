"""Contrastive losses: a sample's partner is told from others, those of its batch or those of a memory.

- :func:`info_nce` chooses the partner among many; its value depends on which samples share a batch, so it is
  wrapped as `Term(info_nce(...).mean())`.
- :func:`nce` decides for each pair alone whether it belongs together. With negatives from a
  :class:`~transfuse.core.memory.Memory` each value belongs to one sample: `Term.of(nce(...))`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from transfuse.losses._inputs import at_least_float32
from transfuse.losses.feature import unit


def info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float = 0.1,
    normalise: bool = True,
    positives: Tensor | None = None,
    candidates: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of finding the key that belongs to each query (van den Oord et al., 2018, arXiv:1807.03748).

        -sum_j p_ij * log softmax_j(<q_i, k_j> / temperature)

    Args:
        queries: `(queries, width)`.
        keys: `(keys, width)`.
        temperature: divides the products.
        normalise: give queries and keys length one first, so that products are cosines.
        positives: `(queries, keys)`, which keys belong to a query: true and false, or weights, which are divided by
            their sum (p). A query without any has value zero. By default key i belongs to query i.
        candidates: `(queries, keys)` boolean, the keys a query chooses among; all by default.

    Returns:
        `(queries,)`.

    Raises:
        ValueError: shapes do not belong together, or the temperature is not positive.

    >>> eye = torch.eye(2)
    >>> info_nce(eye, eye, temperature=1.0)  # log(1 + e ** -1)
    tensor([0.3133, 0.3133])
    """
    if queries.dim() != 2 or keys.dim() != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"queries and keys must be (samples, width) of equal width, found {tuple(queries.shape)} and "
            f"{tuple(keys.shape)}: project one of them first"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, found {temperature}")
    table = (len(queries), len(keys))
    if positives is None:
        if table[0] != table[1]:
            raise ValueError(f"found {table[0]} queries and {table[1]} keys: say with positives which belong together")
        positives = torch.eye(table[0], device=queries.device)
    for name, mask in (("positives", positives), ("candidates", candidates)):
        if mask is not None and mask.shape != table:
            raise ValueError(f"{name} must be {table}, one row per query, found {tuple(mask.shape)}")
    queries, keys = at_least_float32(queries), at_least_float32(keys)
    if normalise:
        queries, keys = unit(queries), unit(keys)
    with torch.autocast(queries.device.type, enabled=False):  # it would multiply in half precision
        scores = queries @ keys.T / temperature
    if candidates is not None:
        scores = scores.masked_fill(~candidates, -math.inf)
    weights = positives.to(scores.dtype)
    # A key of weight zero that is no candidate would be 0 * inf.
    costs = torch.where(weights > 0, -scores.log_softmax(1), 0.0)
    total = weights.sum(1)
    return (weights * costs).sum(1) / total.masked_fill(total == 0, 1.0)


def nce(positive: Tensor, negatives: Tensor, *, population: int) -> Tensor:
    """Noise-contrastive estimation: is this the sample's partner, or one of K drawn from a population of N?

        -log q(positive) - sum_k log(1 - q(negative_k)),  q(f) = exp(f) / (exp(f) + K / N)

    (Gutmann & Hyvarinen, 2010; as the bound of Tian et al., 2020, arXiv:1910.10699.)

    Args:
        positive: scores f of the true pairs, `(batch,)`.
        negatives: scores of the drawn pairs, `(batch, K)`.
        population: N, how many samples the negatives were drawn from.

    Returns:
        `(batch,)`, in float32 at least.

    Raises:
        ValueError: shapes do not belong together.

    >>> nce(torch.zeros(1), torch.zeros(1, 1), population=2)  # -log(2/3) - log(1/3)
    tensor([1.5041])
    """
    if negatives.dim() != 2 or positive.shape != negatives.shape[:1]:
        raise ValueError(
            f"expected scores (batch,) and (batch, negatives), found {tuple(positive.shape)} and "
            f"{tuple(negatives.shape)}"
        )
    noise = math.log(negatives.shape[1] / population)
    return F.softplus(noise - at_least_float32(positive)) + F.softplus(at_least_float32(negatives) - noise).sum(1)

"""Which samples to ask the labels of."""

from __future__ import annotations

from torch import Tensor


def query_scores(
    probabilities: Tensor,
    previous: Tensor | None = None,
    contrast: float = 0.03,
    balance: float = 0.1,
    topk: int = 500,
) -> Tensor:
    """How little a label is worth, `(samples,)`: the smallest scores are to be bought first.

        u     = p + contrast (p - p_prev)
        U     = u_(1) - u_(2)
        score = U / max U + balance n_k / max n,  k = argmax p,  n: counted among the `topk` largest U

    The largest margins are the easy samples; counting among the smallest instead would turn the balance round.
    (LFTL: Lyu et al., 2024, arXiv:2407.18899.)

    Args:
        probabilities: p, `(samples, classes)`.
        previous: p_prev, of the same samples at the last query; None leaves the extrapolation out. u may be negative.
        contrast, balance: weights.
        topk: all samples where there are fewer.
    """
    torn = probabilities if previous is None else probabilities + contrast * (probabilities - previous)
    first, second = torn.topk(2, dim=1).values.unbind(1)
    margins = first - second
    pseudo = probabilities.argmax(1)
    easy = margins.topk(min(topk, len(margins))).indices
    counts = pseudo[easy].bincount(minlength=probabilities.shape[1]).to(margins.dtype)
    return margins / margins.max().clamp_min(1e-12) + balance * (counts / counts.max())[pseudo]

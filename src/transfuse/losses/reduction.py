"""The one reduction, the one mask builder and the one shift of the library.

Every loss ends here: per-sample or per-token values become a :class:`Term`, a sum and a count that are
kept apart until the trainer knows how many samples or tokens the whole update holds (all micro-batches,
all processes). Nothing else in the library divides a loss, so no loss depends on how a batch was cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
"""The label that means "not labelled" or "not scored", as in :func:`torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True, slots=True)
class Term:
    """One term of an objective: a sum, how many things were summed, and what they are called.

    The trainer divides `sum` by the total of `unit` over the whole update, never by `count`; `count` is
    there to check that the term summed what its unit says. `weight` scales the gradient and stays apart
    from the raw value, so that both are logged and solvers see raw gradients.

    Args:
        sum: scalar tensor, the undivided loss.
        count: how many samples, tokens, ... were summed.
        unit: `"sample"`, `"token"`, `"labelled"`, `"part"` (one per micro-batch: batch-coupled losses),
            a unit the method declares in `Method.units`, or `"late:..."` where only the forward pass knows.
        weight: factor of this term in the objective.
    """

    sum: Tensor
    count: Tensor | float = 1.0
    unit: str = "part"
    weight: float = 1.0

    @classmethod
    def of(cls, values: Tensor, mask: Tensor | None = None, unit: str | None = None) -> Term:
        """Sum per-sample `(batch,)` or per-token `(batch, ...)` values, where `mask` is true.

        Args:
            values: losses, one per sample or per token.
            mask: boolean, same shape as `values`; None counts everything.
            unit: what is counted; by default `"sample"` for one dimension, `"token"` for more.

        Raises:
            ValueError: `values` is a scalar (use `Term(value)`: it says that the loss is batch-coupled),
                or mask and values differ in shape.
        """
        if values.dim() == 0:
            raise ValueError("Term.of needs one value per sample or token, found a scalar: use Term(value)")
        unit = unit or ("sample" if values.dim() == 1 else "token")
        if mask is None:
            return cls(values.sum(), float(values.numel()), unit)
        if mask.shape != values.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, the values it selects have {tuple(values.shape)}")
        return cls(torch.where(mask, values, 0).sum(), mask.sum(), unit)

    def __rmul__(self, weight: float) -> Term:
        return Term(self.sum, self.count, self.unit, self.weight * weight)

    @property
    def mean(self) -> Tensor:
        """The value of this term alone: for tests and reading, never for training."""
        return self.sum / self.count


def classes_last(logits: Tensor) -> Tensor:
    """Put the class axis last: `(batch, classes, height, width)` becomes `(batch, height, width, classes)`.

    Two and three dimensions, `(batch, classes)` and `(batch, tokens, classes)`, are that way already.
    """
    return logits.movedim(1, -1) if logits.dim() == 4 else logits


def mask_from_lengths(lengths: Tensor, size: int) -> Tensor:
    """Boolean mask `(batch, size)`, true at the first `lengths[i]` positions of row i.

    Padding is known from lengths, never from token ids: a pad id that equals the end token would hide it.
    """
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def next_token(labels: Tensor) -> Tensor:
    """Move labels one position left, `(batch, tokens)`: position t then holds the token that t predicts.

    The last position predicts nothing and gets :data:`IGNORE`. This is the only shift in the library.
    """
    return torch.cat([labels[:, 1:], labels.new_full((labels.shape[0], 1), IGNORE)], dim=1)

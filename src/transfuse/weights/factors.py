"""Matrices as sums of rank-one terms: truncation, sums of many without ever building them, tuning of singular values.

Everything is computed in float32: half precision has no singular value decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The matrix u diag(s) v^T.

    Attributes:
        u: `(rows, terms)`, columns of length one; s: `(terms,)`, descending; v: `(columns, terms)`.
    """

    u: Tensor
    s: Tensor
    v: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Factors:
        """Singular value decomposition of `(rows, columns)`, min(rows, columns) terms."""
        u, s, vt = torch.linalg.svd(matrix.float(), full_matrices=False)
        return cls(u, s, vt.mT)

    @property
    def terms(self) -> int:
        """How many rank-one terms there are."""
        return len(self.s)

    def dense(self, s: Tensor | None = None) -> Tensor:
        """The matrix, with these singular values or its own."""
        return (self.u * (self.s if s is None else s)) @ self.v.mT

    def top(self, count: int) -> Factors:
        """The terms with the largest s."""
        return self.take(self.s.argsort(descending=True, stable=True)[:count])

    def take(self, which: Tensor | slice) -> Factors:
        """Some of the terms."""
        return Factors(self.u[:, which], self.s[which], self.v[:, which])

    def pooled(self, other: Factors) -> Factors:
        """All terms of two: their sum, its terms no longer orthogonal."""
        return Factors(*(torch.cat([getattr(self, n), getattr(other, n)], dim=-1) for n in ("u", "s", "v")))

    def orthogonal(self) -> Factors:
        """The same matrix as a singular value decomposition, in as many terms, by QR of u and v.

        u = Qu Ru,  v = Qv Rv,  Ru diag(s) Rv^T = U S V^T,  then  u diag(s) v^T = (Qu U) S (Qv V)^T
        """
        qu, ru = torch.linalg.qr(self.u)
        qv, rv = torch.linalg.qr(self.v)
        inner = Factors.of((ru * self.s) @ rv.mT)
        return Factors(qu @ inner.u, inner.s, qv @ inner.v)

    def completed(self, count: int) -> Factors:
        """At least `count` terms: those that are missing have s = 0 and directions orthogonal to all others.

        The terms must be orthogonal. The directions are what a decomposition of the projector onto the rest finds:
        arbitrary, but the same whenever the matrix is.
        """
        missing = count - self.terms
        if missing <= 0:
            return self
        more = Factors(_rest(self.u, missing), self.s.new_zeros(missing), _rest(self.v, missing))
        return self.pooled(more)


def _rest(basis: Tensor, count: int) -> Tensor:
    """Unit vectors orthogonal to the columns of a basis, `(size, count)`."""
    whole, _ = torch.linalg.qr(torch.cat([basis, torch.eye(len(basis), dtype=basis.dtype, device=basis.device)], 1))
    return whole[:, basis.shape[1] : basis.shape[1] + count]

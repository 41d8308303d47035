"""Losses between models that cut the same text into different tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST = 1e-6
"""Added to negative log-likelihoods, so that a certain chunk still has a complement."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Chunks of the same bytes on both sides, numbered along each row.

    Attributes:
        student, teacher: `(batch, tokens)` the chunk each token lies in; `count` where it lies in none.
        valid: `(batch, count)` whether the chunk is scored: every one of its tokens is, on both sides.
    """

    student: Tensor
    teacher: Tensor
    valid: Tensor

    @property
    def count(self) -> int:
        """Chunks of the row that has most."""
        return self.valid.shape[1]

    def sum(self, values: Tensor, chunks: Tensor) -> Tensor:
        """The sum over the tokens of each chunk, `(batch, count)`, of `(batch, tokens)` values."""
        sums = values.new_zeros(len(values), self.count + 1).scatter_add(1, chunks, values)
        return sums[:, :-1]


def align_spans(student_ends: Tensor, student_scored: Tensor, teacher_ends: Tensor, teacher_scored: Tensor) -> Spans:
    """The smallest chunks that begin and end at token boundaries of both sides.

    Args:
        student_ends, teacher_ends: `(batch, tokens)` int64, the byte after each token; a token without bytes (special
            tokens, padding) repeats the one before it, and lies in no chunk.
        student_scored, teacher_scored: boolean, the same shapes, whether a token's likelihood is known and counts.

    Raises:
        ValueError: the sides differ in their number of rows.
    """
    if len(student_ends) != len(teacher_ends):
        raise ValueError(f"{len(student_ends)} rows of the student and {len(teacher_ends)} of the teacher")
    rows, last = len(student_ends), int(max(student_ends.max(), teacher_ends.max()))
    sides = []
    for ends in (student_ends, teacher_ends):
        solid = ends > F.pad(ends[:, :-1], (1, 0))
        at = torch.zeros(rows, last + 1, dtype=torch.bool, device=ends.device)
        sides.append((solid, at.scatter(1, torch.where(solid, ends, 0), True)))
    both = sides[0][1] & sides[1][1]
    both[:, 0] = False
    before = both.cumsum(1) - both.long()  # how many chunks end before a byte
    total = both.sum(1, keepdim=True)
    count = int(total.max())
    number, scored = [], []
    for ends, known, (solid, _) in zip(
        (student_ends, teacher_ends), (student_scored, teacher_scored), sides, strict=True
    ):
        found = before.gather(1, ends)
        chunk = torch.where(solid & (found < total), found, count)
        unknown = torch.zeros(rows, count + 1, device=ends.device).scatter_add(1, chunk, (~known).float())
        number.append(chunk)
        scored.append(unknown[:, :-1] == 0)
    exists = torch.arange(count, device=total.device) < total
    return Spans(number[0], number[1], exists & scored[0] & scored[1])


def binary_kl(student: Tensor, teacher: Tensor, temperature: float = 100.0) -> Tensor:
    """Divergence between two likelihoods of one event, times the temperature, `(...)`.

        q = s ** (1/T), p = t ** (1/T):   T * (p log(p / q) + (1 - p) log((1 - p) / (1 - q)))

    For T to infinity it is `b - a + a log(a / b)` with a = -log t, b = -log s, so the size of the gradient does not
    depend on T. A high T makes unlikely events count: those of many bytes have likelihoods near 0.

    Args:
        student, teacher: log-likelihoods, at most 0; gradients reach the student alone.
        temperature: T.
    """
    a, b = (-x.clamp(max=0) / temperature + SMALLEST for x in (teacher.detach(), student))
    agree = (-a).exp() * (b - a)
    return temperature * (agree - torch.expm1(-a) * (_log_complement(a) - _log_complement(b)))


def sorted_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum of absolute differences between probabilities sorted in descending order, `(...)`.

    The smaller vocabulary is filled up with zeros.

    Args:
        student, teacher: logits `(..., classes)`, each with its own number of classes.
    """
    size = max(student.shape[-1], teacher.shape[-1])
    ours, theirs = (
        F.pad(x.softmax(-1).sort(-1, descending=True).values, (0, size - x.shape[-1]))
        for x in (student, teacher.detach())
    )
    return (ours - theirs).abs().sum(-1)


def _log_complement(a: Tensor) -> Tensor:
    """log(1 - exp(-a)) for a > 0, exact for small and for large a."""
    small = a < 0.6931
    safe = torch.where(small, a, 0.5)
    return torch.where(small, (-torch.expm1(-safe)).log(), torch.log1p(-(-torch.where(small, 1.0, a)).exp()))

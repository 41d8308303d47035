"""Divergences and cross-entropy of logits that are never built, with their gradients, in one pass over the vocabulary.

A chunk of rows at a time is multiplied out, turned in place into its gradient, and multiplied back; nothing of
`(tokens, vocabulary)` outlives its chunk and nothing is computed twice. The gradients are ready when the values are,
so they are formed for the weights that a loss is expected to give to its rows. Should others arrive in the backward
pass, everything is computed once more with those, so the result is exact either way.

Rows that are excluded somewhere (logits of -inf) go through the functions of :mod:`transfuse.losses.divergence`, whose
conventions hold here as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transfuse.losses.reduction import IGNORE
from transfuse.losses.scores import Projection, Sampled, Target, TopK
from transfuse.losses.supervised import cross_entropy, require_labels

if TYPE_CHECKING:
    from transfuse.losses.match import Divergence

CHUNK = 256
"""Rows multiplied out at a time: enough for the matrix products, few enough for memory."""
BLOCK = 32
"""Rows of a chunk worked on at a time by a CPU: what fits into its cache."""

Spare = tuple[Tensor, Tensor]
Weights = tuple[Tensor, Tensor] | None

_log_softmax = torch.ops.aten._log_softmax.out


def fused(
    student: Projection,
    target: Target | None,
    divergence: Divergence | None,
    *,
    labels: Tensor | None = None,
    rows: Tensor | None = None,
    expect: tuple[float, float] = (1.0, 1.0),
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Values `(...)` of the divergence and of the labels' cross-entropy; 0 for what was not asked for.

    Args:
        target: no gradient flows to it; None, as `divergence`, for the cross-entropy alone.
        labels, rows, expect: as in :func:`transfuse.losses.match`.
        chunk: rows multiplied out at a time.

    Raises:
        ValueError: target or labels do not fit the student's rows and classes, or labels are out of range.
    """
    if target is not None and tuple(target.shape) != student.shape:
        raise ValueError(
            f"student and teacher must have equal shapes, found {student.shape} (student) and "
            f"{tuple(target.shape)} (teacher): both must speak of the same tokens and the same vocabulary"
        )
    if labels is not None:
        require_labels(labels, student.shape)
    hidden, weight, bias = student.hidden.flatten(0, -2), student.weight, student.bias
    total = len(hidden)
    chosen = None if rows is None else rows.flatten().nonzero()[:, 0]
    if chosen is not None and len(chosen) == total:
        chosen = None
    if chosen is not None:
        hidden = hidden[chosen]
    truth = None if labels is None else _rows(labels.flatten(), chosen).long()
    work = _Work(_detached(target, chosen), divergence, truth, expect, chunk)
    learns = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
    if torch.is_grad_enabled() and any(learns):
        values = _Fused.apply(hidden, weight, bias, work)
    else:
        values, _ = work.run(hidden, weight, bias, None, (False, False, False))
    if chosen is not None:
        values = tuple(v.new_zeros(total).index_copy(0, chosen, v) for v in values)
    return values[0].view(student.shape[:-1]), values[1].view(student.shape[:-1])


class _Fused(torch.autograd.Function):
    """The two values of every row; `work` knows what they are compared with."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.work, ctx.expected = work, work.expected(hidden)
        values, ctx.gradients = work.run(hidden, weight, bias, ctx.expected, ctx.needs_input_grad[:3])
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, soft: Tensor, hard: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        given = ctx.work.counted(soft, hard)
        scale = _ratio(given, ctx.expected)
        if scale is None or ctx.gradients is None:
            _, gradients = ctx.work.run(hidden, weight, bias, given, ctx.needs_input_grad[:3])
        else:
            # Given away, since whoever gets them may keep them: a second pass through this graph computes its own.
            gradients, ctx.gradients = ctx.gradients, None
            gradients = tuple(None if g is None else g.mul_(scale.to(g.dtype)) for g in gradients)
        return (*gradients, None)


@dataclass(frozen=True)
class _Work:
    """What the rows of a student are compared with, and how."""

    target: Target | None
    divergence: Divergence | None
    labels: Tensor | None
    expect: tuple[float, float]
    chunk: int

    def expected(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients on both values that the loss will probably send back."""
        ones = torch.ones(len(hidden), dtype=_precision(hidden), device=hidden.device)
        return self.counted(ones * self.expect[0], ones * self.expect[1])

    def counted(self, soft: Tensor, hard: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients on both values, without those on what is no value: a divergence from nothing, no label."""
        if self.divergence is None:
            soft = torch.zeros_like(soft)
        return soft, torch.zeros_like(hard) if self.labels is None else hard.where(self.labels != IGNORE, 0)

    def run(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        given: tuple[Tensor, Tensor] | None,
        wanted: tuple[bool, ...],
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
        """Both values `(rows,)`, and the gradients of hidden states, weight and bias for the `given` ones."""
        precision = _precision(hidden)
        found = torch.zeros(2, len(hidden), dtype=precision, device=hidden.device)
        cast = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if given and wanted[0] else None
        d_weight = torch.zeros(weight.shape, dtype=precision, device=hidden.device) if given and wanted[1] else None
        d_bias = torch.zeros(len(weight), dtype=precision, device=hidden.device) if given and wanted[2] else None
        room = _Room(min(self.chunk, len(hidden)), len(weight), precision, hidden.device)
        for begin in range(0, len(hidden), self.chunk):
            part = slice(begin, begin + self.chunk)
            logits = room.product("student", hidden[part], cast, bias)
            whole = self._teacher(room, part)
            for block in room.blocks(len(logits)):
                at = slice(begin + block.start, begin + block.stop)
                weights = None if given is None else (given[0][at, None], given[1][at, None])
                teacher = None if whole is None else whole[block] if isinstance(whole, Tensor) else _part(whole, block)
                labels = None if self.labels is None else self.labels[at]
                found[:, at] = self._rows(logits[block], teacher, labels, weights, room)
                if not found[:, at].isfinite().all():
                    found[:, at] = self._again(hidden[at], cast, bias, at, weights, logits[block])
            if given is None:
                continue
            gradient = logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(gradient, cast, out=d_hidden[part])
            if d_weight is not None and hidden.dtype == precision:
                d_weight.addmm_(gradient.T, hidden[part])
            elif d_weight is not None:
                d_weight.add_(gradient.T @ hidden[part])
            if d_bias is not None:
                d_bias.add_(logits.sum(0))
        dtypes = (hidden, weight, bias)
        gradients = tuple(
            None if g is None or t is None else g.to(t.dtype)
            for g, t in zip((d_hidden, d_weight, d_bias), dtypes, strict=True)
        )
        return (found[0].clone(), found[1].clone()), gradients

    def _teacher(self, room: _Room, part: slice) -> Target | None:
        """The chunk's teacher logits, in a buffer that may be overwritten, or its part of a sparse target."""
        if isinstance(self.target, Projection):
            cast = self.target.weight.to(self.target.hidden.dtype)
            return room.product("teacher", self.target.hidden[part], cast, self.target.bias)
        if isinstance(self.target, Tensor):
            return room.buffer("teacher", len(self.target[part])).copy_(self.target[part])
        return None if self.target is None else _part(self.target, part)

    def _rows(
        self,
        logits: Tensor,
        teacher: Target | None,
        labels: Tensor | None,
        weights: Weights,
        room: _Room,
    ) -> Tensor:
        """Both values of a block, `(2, rows)`; where weights are given, its logits become their gradient."""
        found = logits.new_zeros(2, len(logits))
        if self.divergence is None or teacher is None:
            _log_softmax(logits, -1, False, out=logits)
            found[1] = _labels(logits, labels)
            if weights:
                logits.exp_().mul_(weights[1])
                _subtract_labels(logits, labels, weights[1])
            return found
        temperature = self.divergence.temperature
        scale = temperature**2 if self.divergence.temperature_squared else 1.0
        apart = labels is not None and temperature != 1  # then labels need a softmax of their own
        if apart:
            own = _log_softmax(logits, -1, False, out=room.spare("own", len(logits)))
            found[1] = _labels(own, labels)
        if temperature != 1:
            logits.div_(temperature)
            if isinstance(teacher, Tensor):
                teacher.div_(temperature)
        inner: Weights = None
        if weights:
            inner = weights[0] * (scale / temperature), torch.zeros_like(weights[1]) if apart else weights[1]
        if not isinstance(teacher, Tensor):
            _log_softmax(logits, -1, False, out=logits)
        else:
            if self.divergence.kind == "interpolated":
                torch.lerp(logits, teacher, self.divergence.share or 0.0, out=teacher)
            _log_softmax(logits, -1, False, out=logits)
            _log_softmax(teacher, -1, False, out=teacher)
        if labels is not None and not apart:
            found[1] = _labels(logits, labels)
        if isinstance(teacher, TopK):
            found[0] = _top_k(logits, teacher, inner)
        elif isinstance(teacher, Sampled):
            found[0] = _sampled(logits, teacher, inner)
        elif isinstance(teacher, Tensor):
            spare = (room.spare("a", len(logits)), room.spare("b", len(logits)))
            # Rounding may end below zero; the gradient is right even then.
            kernel = KERNELS[self.divergence.kind]
            found[0] = kernel(logits, teacher, spare, self.divergence.share or 0.0, inner).clamp_(min=0)
        found[0] *= scale
        if weights and labels is not None:
            if apart:
                logits.addcmul_(own.exp_(), weights[1])
            _subtract_labels(logits, labels, weights[1])
        return found

    def _again(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        at: slice,
        weights: Weights,
        out: Tensor,
    ) -> Tensor:
        """The same of a block with excluded classes, by the functions that know what they mean."""
        logits = Projection(hidden, weight, bias).dense().to(out.dtype).requires_grad_()
        with torch.enable_grad():
            found = torch.zeros(2, len(logits), dtype=out.dtype, device=out.device)
            if self.divergence is not None and self.target is not None:
                target = self.target[at] if isinstance(self.target, Tensor) else _part(self.target, at)
                target = target.dense() if isinstance(target, Projection) else target
                found[0] = self.divergence(logits, target.to(out.dtype) if isinstance(target, Tensor) else target)
            if self.labels is not None:
                found[1] = cross_entropy(logits, self.labels[at])
            if weights is not None:
                sent = torch.stack([w[:, 0] for w in weights]).where(found.isfinite(), 0)
                out.copy_(torch.autograd.grad(found, logits, sent)[0].nan_to_num(0.0, 0.0, 0.0))
        return found.detach()


class _Room:
    """Buffers that every chunk and block uses again."""

    def __init__(self, rows: int, classes: int, dtype: torch.dtype, device: torch.device):
        self.rows, self.classes, self.dtype, self.device = rows, classes, dtype, device
        self.block = min(BLOCK, rows) if device.type == "cpu" else rows
        self.buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, rows: int, most: int | None = None) -> Tensor:
        """The first rows of a buffer of logits."""
        if name not in self.buffers:
            self.buffers[name] = torch.empty(most or self.rows, self.classes, dtype=self.dtype, device=self.device)
        return self.buffers[name][:rows]

    def spare(self, name: str, rows: int) -> Tensor:
        """Room for a block."""
        return self.buffer("spare " + name, rows, self.block)

    def blocks(self, rows: int) -> Iterator[slice]:
        """A chunk's rows in blocks."""
        return (slice(i, min(i + self.block, rows)) for i in range(0, rows, self.block))

    def product(self, name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The logits of a chunk."""
        logits = self.buffer(name, len(hidden))
        if hidden.dtype == self.dtype:
            torch.mm(hidden, weight.T, out=logits)
        else:
            logits.copy_(hidden @ weight.T)
        return logits if bias is None else logits.add_(bias.to(self.dtype))


# The kernels: log-probabilities of both sides in, values out. Where the weights of rows, `(soft, hard)`, each
# `(rows, 1)`, are given, what is left in `s` is soft * d(value) + hard * softmax(s), by the logits. All other buffers
# are overwritten.


def _forward(s: Tensor, t: Tensor, spare: Spare, share: float, weights: Weights) -> Tensor:
    p = torch.exp(t, out=spare[0])
    value = _dot(p, t.sub_(s))
    _difference(s, p, weights)
    return value


def _reverse(s: Tensor, t: Tensor, spare: Spare, share: float, weights: Weights) -> Tensor:
    torch.sub(s, t, out=t)
    return _by_probability(s.exp_(), t, weights)


def _skew(s: Tensor, t: Tensor, spare: Spare, share: float, weights: Weights) -> Tensor:
    if share == 0:
        return _forward(s, t, spare, share, weights)
    p = torch.exp(t, out=spare[0])
    mixed = torch.lerp(s.exp_(), p, share, out=spare[1]).clamp_(min=_tiny(s))
    value = _dot(p, t)
    value -= _dot(p, torch.log(mixed, out=t))
    _by_probability(s, p.div_(mixed).mul_(share - 1), weights)
    return value


def _skew_reverse(s: Tensor, t: Tensor, spare: Spare, share: float, weights: Weights) -> Tensor:
    if share == 0:
        return _reverse(s, t, spare, share, weights)
    p = torch.exp(s, out=spare[0])
    mixed = torch.lerp(t.exp_(), p, share, out=t).clamp_(min=_tiny(s))
    s.sub_(torch.log(mixed, out=spare[1]))
    value = _dot(p, s)
    s.addcdiv_(p, mixed, value=-share)
    _by_probability(p, s, weights)
    s.copy_(p)
    return value


def _jensen_shannon(s: Tensor, t: Tensor, spare: Spare, share: float, weights: Weights) -> Tensor:
    p, q = torch.exp(t, out=spare[0]), torch.exp(s, out=spare[1])
    value = share * _dot(p, t)
    mixed = torch.lerp(q, p, share, out=t).clamp_(min=_tiny(s)).log_()
    value -= share * _dot(p, mixed)
    s.sub_(mixed)
    value += (1 - share) * _by_probability(q, s, weights and ((1 - share) * weights[0], weights[1]))
    s.copy_(q)
    return value


def _interpolated(s: Tensor, t: Tensor, spare: Spare, share: float, weights: Weights) -> Tensor:
    p = t.exp_()
    value = -_dot(p, s)
    _difference(s, p, weights)
    return value


def _total_variation(s: Tensor, t: Tensor, spare: Spare, share: float, weights: Weights) -> Tensor:
    difference = torch.sub(s.exp_(), t.exp_(), out=t)
    value = 0.5 * torch.linalg.vector_norm(difference, 1, dim=-1)
    _by_probability(s, difference.sign_().mul_(0.5), weights)
    return value


KERNELS: dict[str, Callable[[Tensor, Tensor, Spare, float, Weights], Tensor]] = {
    "forward": _forward,
    "reverse": _reverse,
    "skew": _skew,
    "skew_reverse": _skew_reverse,
    "jensen_shannon": _jensen_shannon,
    "interpolated": _interpolated,
    "total_variation": _total_variation,
}


def _difference(s: Tensor, p: Tensor, weights: Weights) -> None:
    """The gradient softmax(s) - p of everything that is a cross-entropy to p; s holds log-probabilities."""
    if weights:
        s.exp_().mul_(weights[0] + weights[1]).addcmul_(p, weights[0], value=-1)


def _by_probability(p: Tensor, slope: Tensor, weights: Weights) -> Tensor:
    """The mean slope under p, whose gradient by the logits, p * (slope - mean), takes the place of p."""
    mean = _dot(p, slope)
    if weights:
        p.mul_(slope.sub_(mean[:, None]).mul_(weights[0]).add_(weights[1]))
    return mean


def _top_k(s: Tensor, t: TopK, weights: Weights) -> Tensor:
    log_p = t.log_probabilities.to(s.dtype)
    p = log_p.exp()
    kept = p > 0
    log_s = s.gather(-1, t.ids)
    q = log_s.exp().where(kept, 0)
    rest_p, rest_q = (1 - p.sum(-1, keepdim=True)).clamp(min=0), 1 - q.sum(-1, keepdim=True)
    floor = rest_q.clamp(min=1e-7)
    value = torch.where(kept, p * (log_p - log_s), 0).sum(-1)
    value += (torch.special.xlogy(rest_p, rest_p) - rest_p * floor.log())[:, 0]
    if weights:
        soft, hard = weights
        lost = torch.where(rest_q > 1e-7, rest_p / floor, 0)
        s.exp_().mul_(soft * (p.sum(-1, keepdim=True) + rest_p - lost) + hard)
        s.scatter_add_(-1, t.ids, soft * (q * lost - p))
    return value


def _sampled(s: Tensor, t: Sampled, weights: Weights) -> Tensor:
    shares = t.shares.to(s.dtype)
    log_s = s.gather(-1, t.ids)
    value = torch.where(shares > 0, torch.special.xlogy(shares, shares) - shares * log_s, 0).sum(-1)
    if weights:
        soft, hard = weights
        s.exp_().mul_(soft * shares.sum(-1, keepdim=True) + hard)
        s.scatter_add_(-1, t.ids, -soft * shares)
    return value


def _labels(log_s: Tensor, labels: Tensor | None) -> Tensor:
    """Cross-entropy of each row; 0 without a label."""
    assert labels is not None
    found = -log_s.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return found.where(labels != IGNORE, 0)


def _subtract_labels(gradient: Tensor, labels: Tensor | None, weight: Tensor) -> None:
    assert labels is not None
    gradient.scatter_add_(-1, labels.clamp(min=0)[:, None], torch.where(labels[:, None] != IGNORE, -weight, 0))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]


def _tiny(of: Tensor) -> float:
    return torch.finfo(of.dtype).tiny


def _precision(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _rows(values: Tensor, chosen: Tensor | None) -> Tensor:
    return values if chosen is None else values[chosen]


def _part(target: Any, part: slice) -> Any:
    return target.on_samples(lambda value: value[part])


def _detached(target: Target | None, chosen: Tensor | None) -> Target | None:
    """A target with one leading dimension, and only the chosen rows of it."""
    if target is None:
        return None
    if isinstance(target, Tensor):
        return _rows(target.detach().flatten(0, -2), chosen)
    return target.on_samples(lambda value: _rows(value.detach().flatten(0, -2), chosen))


def _ratio(given: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> Tensor | None:
    """The one factor between two pairs of gradients; None where there is none."""
    both, theirs = torch.cat(given), torch.cat(expected)
    if not len(theirs):
        return None
    at = theirs.abs().argmax()
    if not theirs[at]:
        return None
    scale = both[at] / theirs[at]
    same = torch.isclose(both, scale * theirs, rtol=8 * torch.finfo(both.dtype).eps, atol=0.0)
    return scale if bool(same.all()) and math.isfinite(scale) else None

"""One update of one phase: terms of many micro-batches and processes become one gradient.

This is the only place where a loss is divided, and the only one that calls `backward`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from transfuse.core.batch import Batch
from transfuse.core.errors import MethodError
from transfuse.core.phases import Losses, Phase
from transfuse.core.sync import Sync
from transfuse.losses.reduction import IGNORE, Term

if TYPE_CHECKING:
    from transfuse.core.method import Method

Totals = dict[str, float]


def count_units(method: Method, micro: Sequence[Mapping[str, Batch]]) -> Totals:
    """How many samples, tokens, labelled positions, parts and own units these micro-batches hold.

    Units of the first stream go by their plain name, those of others by `stream/unit`. Looked at before the
    first forward pass, and on the CPU, so that no accelerator has to wait.
    """
    totals: Totals = {"part": float(len(micro))}
    for batches in micro:
        for position, (stream, batch) in enumerate(batches.items()):
            prefix = "" if position == 0 else stream + "/"
            counts: dict[str, float | Tensor] = {"sample": batch.size}
            if batch.labels is not None:
                counts["labelled"] = (batch.labels != IGNORE).sum()
            if batch.mask is not None:
                counts["token"] = batch.mask.sum()
            if position == 0:
                counts |= {unit: count(batch) for unit, count in method.units.items()}
            for unit, value in counts.items():
                totals[prefix + unit] = totals.get(prefix + unit, 0.0) + float(value)
    return totals


class Update:
    """Collects the micro-batches of one update of a phase.

    Args:
        phase: whose parameters get the gradient.
        local: this process's unit counts; `totals` those of all processes.
        scaler: scales the loss in half-precision training.
    """

    def __init__(self, phase: Phase, local: Totals, totals: Totals, sync: Sync, scaler: torch.amp.GradScaler):
        self.phase, self.local, self.sync, self.scaler = phase, local, sync, scaler
        self.terms: dict[str, Term] = {}
        """Each term over the micro-batches so far, detached."""
        self.totals = totals
        self._late: dict[str, list[Tensor]] = {}
        self._rows: dict[str, list[Tensor]] = {}

    def note(self, terms: Losses) -> None:
        """Take down the terms of one micro-batch.

        Raises:
            MethodError: a term is no Term, counts an unknown unit, or cannot be combined.
        """
        for name, term in terms.items():
            self._record(name, term)

    def backward(self, terms: Losses) -> None:
        """Add the gradients of one micro-batch.

        Raises:
            MethodError: no term depends on what the phase trains.
        """
        loss: Tensor | None = None
        for name, term in terms.items():
            if self._is_late(term):
                scaled = self.scaler.scale(term.weight * term.sum)
                self._accumulate(self._late, name, scaled, self.phase.params)
            elif total := self.totals[term.unit]:
                if self.phase.combine:
                    self._accumulate(self._rows, name, term.sum / total, self.phase.shared)
                part = term.sum * (term.weight / total)
                loss = part if loss is None else loss + part
        if loss is None:
            return
        if not loss.requires_grad:
            raise MethodError(
                f"phase {self.phase.name!r}: none of its terms ({', '.join(terms)}) depends on a parameter it trains"
            )
        self.scaler.scale(loss).backward(inputs=self._summed_params())

    def finish(self) -> None:
        """Bring the gradients of all processes and of the late terms together."""
        self.sync.reduce(self.phase.params)
        for name, gradients in self._late.items():
            total = self.total(name)
            for p, gradient in zip(self.phase.params, gradients, strict=True):
                gradient = self.sync.sum(gradient) / (total or 1.0)
                p.grad = gradient if p.grad is None else p.grad + gradient

    def rows(self) -> dict[str, list[Tensor]]:
        """The raw gradient of each term on the shared parameters, over the whole update."""
        return {name: [self.sync.sum(g) for g in row] for name, row in self._rows.items()}

    def values(self) -> dict[str, Tensor]:
        """The raw value of each term over the whole update and all processes, without terms that counted nothing."""
        totals = {name: self.total(name) for name in self.terms}
        parts = {name: self.terms[name].sum / total for name, total in totals.items() if total}
        if not parts or self.sync.world == 1:
            return parts
        return dict(zip(parts, self.sync.sum(torch.stack(list(parts.values()))), strict=True))

    def total(self, name: str) -> float:
        """What a term's unit holds in the whole update."""
        term = self.terms[name]
        if not self._is_late(term):
            return self.totals[term.unit]
        return float(self.sync.sum(torch.tensor(float(term.count), dtype=torch.float64)))

    def check_counts(self) -> None:
        """Compare what the terms counted with what their units hold.

        Raises:
            MethodError: a term counted something else than its unit says, so its mean would be wrong.
        """
        for name, term in self.terms.items():
            held = self.local.get(term.unit)
            if held is not None and abs(float(term.count) - held) > 0.5:
                raise MethodError(
                    f"phase {self.phase.name!r}: the term {name!r} counted {float(term.count):g}, its unit "
                    f"{term.unit!r} totals {held:g} in this update. Use the batch's own mask, or declare a unit of "
                    "your own in Method.units, or the unit 'late:...' where only the forward pass knows"
                )

    def _record(self, name: str, term: Term) -> None:
        if not isinstance(term, Term):
            raise MethodError(f"the term {name!r} is a {type(term).__name__}: return Term(value) or Term.of(values)")
        if term.sum.dim():
            raise MethodError(f"the term {name!r} has shape {tuple(term.sum.shape)}: use Term.of(values, mask)")
        if not self._is_late(term) and term.unit not in self.totals:
            raise MethodError(
                f"the term {name!r} counts {term.unit!r}, which this batch does not have: "
                f"it has {', '.join(self.totals)}; declare other units in Method.units"
            )
        if self._is_late(term) and self.phase.combine:
            raise MethodError(
                f"the term {name!r} counts {term.unit!r}, known only after the forward pass: a phase with combine "
                "needs units known before it; declare one in Method.units"
            )
        old, value = self.terms.get(name), term.sum.detach().float()
        both = (value, term.count) if old is None else (old.sum + value, old.count + term.count)
        self.terms[name] = Term(*both, term.unit, term.weight)

    def _is_late(self, term: Term) -> bool:
        # The tokens of unlabelled dense outputs are known only from the logits.
        return term.unit.startswith("late:") or (term.unit == "token" and "token" not in self.local)

    def _summed_params(self) -> Sequence[Tensor]:
        """The parameters that get the weighted sum: all but those a solver decides."""
        if not self.phase.combine:
            return self.phase.params
        decided = set(self.phase.shared)
        return [p for p in self.phase.params if p not in decided]

    @staticmethod
    def _accumulate(store: dict[str, list[Tensor]], name: str, value: Tensor, params: Sequence[Tensor]) -> None:
        row = gradients(value, params)
        store[name] = [a + b for a, b in zip(store[name], row, strict=True)] if name in store else row


def gradients(value: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of a scalar on each parameter, zero where it does not depend on it; the graph is kept."""
    if not value.requires_grad:
        return [torch.zeros_like(p) for p in params]
    found = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]

"""What a run tells its user unasked: terms that teach nothing, and parameters that nothing teaches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from transfuse.core.phases import Losses, Phase
from transfuse.core.update import Totals, gradients

PATIENCE = 50
SHARE = 0.01
FIRST = 10
"""Updates after which a parameter without a gradient is called untaught."""


class TransferWarning(UserWarning):
    """Training goes on, but something about it deserves a look."""


class Watch:
    """Looks at the terms of every phase and speaks up once per finding.

    A weighted term that is exactly zero for 50 updates, or has less than 1 % of the gradient over 50 updates, is
    reported; so are parameters of a phase that get no gradient. Gradient norms cost a backward pass
    per term, so they are taken at updates 0, 25, 50, 200, 400, 600, ...
    """

    def __init__(self) -> None:
        self.messages: dict[str, str] = {}
        self._zero: dict[str, int] = {}
        self._small: dict[str, int] = {}
        self._silent: dict[str, list[str]] = {}

    def due(self, step: int) -> bool:
        """Whether gradient norms are taken at this update of the stage."""
        return step in (0, 25, 50) or step % 200 == 0

    def norms(self, phase: Phase, terms: Losses, totals: Totals) -> dict[str, float]:
        """The norm of each weighted term's gradient on the phase's parameters, from one micro-batch."""
        found = {}
        for name, term in terms.items():
            total = totals.get(term.unit) or 1.0
            row = gradients(term.sum * (term.weight / total), phase.params)
            found[name] = math.sqrt(sum(float(g.float().pow(2).sum()) for g in row))
        return found

    def values(self, phase: Phase, values: Mapping[str, float], weights: Mapping[str, float]) -> None:
        """Look at the values of one update."""
        for name, value in values.items():
            key = f"{phase.name}/{name}"
            zero = value == 0.0 and weights[name] != 0.0
            self._zero[key] = self._zero.get(key, 0) + 1 if zero else 0
            if self._zero[key] == PATIENCE:
                self.say(
                    f"zero: {key}",
                    f"the term {name!r} has been exactly 0 for {PATIENCE} updates: it teaches nothing. "
                    "Check that it reads the tensors it should, and its mask",
                )

    def shares(self, phase: Phase, norms: Mapping[str, float], weights: Mapping[str, float], step: int) -> None:
        """Look at the gradient norms of one update."""
        total = sum(norms.values())
        for name, norm in norms.items():
            key = f"{phase.name}/{name}"
            if weights[name] == 0.0 or self._zero.get(key) or len(norms) < 2 or norm >= SHARE * total:
                self._small.pop(key, None)
            elif step - self._small.setdefault(key, step) >= PATIENCE:
                self.say(
                    f"small gradient: {key}",
                    f"the term {name!r} has had less than {SHARE:.0%} of the gradient for {PATIENCE} updates "
                    f"(now {norm / total:.2%}): raise its weight, or leave it out",
                )

    def enter_stage(self) -> None:
        """A new stage trains what it says, so the search for untaught parameters begins anew."""
        self._silent = {}

    def untaught(self, phase: Phase, names: Mapping[nn.Parameter, str], terms: Iterable[str], step: int) -> None:
        """Look for parameters that get no gradient in the first updates, from no phase that shares the optimiser."""
        if step >= FIRST:
            return
        silent = {names.get(p, "?") for p in phase.params if p.grad is None}
        self._silent[phase.optimizer] = found = sorted(silent & set(self._silent.get(phase.optimizer, silent)))
        if step == FIRST - 1 and found:
            shown = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
            self.say(
                f"untaught: {phase.optimizer}",
                f"{len(found)} parameter tensor(s) get no gradient from {', '.join(terms)} and stay as they are: "
                f"{shown}. Add a method that teaches them (for instance + Labels() or + KD()), or follow with Then",
            )

    def state_dict(self) -> dict[str, Any]:
        """What has been counted and said."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        vars(self).update(state)

    def say(self, finding: str, message: str) -> None:
        """Tell the user, once per finding; the report lists it, too."""
        if finding not in self.messages:
            self.messages[finding] = message
            warnings.warn(message, TransferWarning, stacklevel=2)

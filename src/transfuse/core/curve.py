"""The learning curve of a run: what was read between two records, averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RECORDS = 200
"""A curve has about this many points per stage, whatever its length."""


class Curve:
    """Collects the values of terms and makes a record of them now and then.

    Attributes:
        records: `{"step", "epoch", "loss", "terms": {name: {"raw", "weighted", "gradient_norm"}}, "validate"}`; `step`
            counts updates over all stages, `loss` is the sum of the weighted terms.
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self._window: dict[str, list[float]] = {}
        self._weights: dict[str, float] = {}
        self._norms: dict[str, float | None] = {}

    def note(self, values: Mapping[str, float], weights: Mapping[str, float], norms: Mapping[str, float]) -> None:
        """Take the values of one update; gradient norms are there only now and then."""
        for name, value in values.items():
            self._window.setdefault(name, []).append(value)
            self._weights[name], self._norms[name] = weights[name], norms.get(name)

    def record(self, step: int, epoch: float, score: float | None) -> dict[str, Any]:
        """Close the window and add a point; where nothing was read since the last one, its terms are repeated."""
        terms = {name: self._mean(name, values) for name, values in self._window.items()}
        if not terms and self.records:
            terms = self.records[-1]["terms"]
        loss = sum(term["weighted"] or 0.0 for term in terms.values())
        self._window = {}
        self.records.append({"step": step, "epoch": epoch, "loss": loss, "terms": terms, "validate": score})
        return self.records[-1]

    def state_dict(self) -> dict[str, Any]:
        """All that was collected."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        vars(self).update(state)

    def _mean(self, name: str, values: list[float]) -> dict[str, float | None]:
        raw = sum(values) / len(values)
        return {"raw": raw, "weighted": self._weights[name] * raw, "gradient_norm": self._norms[name]}

from __future__ import annotations

import pytest

from transfuse.core.clock import Clock, Constant, Cosine, InverseDecay, Linear, Warmup


def at(step: int, steps: int = 10) -> Clock:
    return Clock(step=step, steps=steps, per_epoch=4)


def test_counts_epochs_from_updates():
    assert [at(s).epoch for s in (0, 3, 4, 9)] == [0, 0, 1, 2]
    assert at(0).epochs == 3
    assert at(5).fraction == 0.5
    assert Clock(step=3, steps=9).epoch == 0


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(2.0), [2, 2, 2]),
        (Linear(1.0, 0.0), [1, 0.5, 0]),
        (Cosine(), [1, 0.5, 0]),
        (Cosine(3.0, 1.0), [3, 2, 1]),
        (InverseDecay(3.0, 0.5), [1, 2.5**-0.5, 0.5]),
        (2 * Linear(0.0, 1.0), [0, 1, 2]),
        (Linear(0.0, 1.0) * Linear(1.0, 0.0), [0, 0.25, 0]),
    ],
)
def test_schedules_at_start_middle_and_end(schedule, values):
    assert [schedule(at(s)) for s in (0, 5, 10)] == pytest.approx(values)


def test_warmup_rises_and_never_starts_at_zero():
    warm = Warmup(4, Constant(2.0))
    assert [warm(at(s)) for s in range(6)] == pytest.approx([0.5, 1, 1.5, 2, 2, 2])

"""Did the transfer arrive? One word and one sentence, from intervals and never from a point.

The intervals come from :mod:`transfuse.measure.interval`.
"""

from __future__ import annotations

from transfuse.measure.interval import Interval

ARRIVED = "arrived"
NO_EFFECT = "no effect"
NEGATIVE = "negative transfer"
NOT_COMPARED = "not compared"
"""For reports without a baseline: :func:`verdict` itself always has a gain to judge."""


def verdict(gain: Interval, control: Interval | None = None, *, higher_is_better: bool = True) -> tuple[str, str]:
    """Judge a gain, and whether it is the teacher's doing.

    Args:
        gain: method minus baseline.
        control: method minus the same method with a teacher whose outputs were shuffled over the samples.
            It can take an arrival back, since a gain that a shuffled teacher gives as well is not transfer
            (of regularisation, say). It cannot excuse a loss.
        higher_is_better: true for accuracy, false for losses and errors.

    Returns:
        The word, :data:`ARRIVED`, :data:`NO_EFFECT` or :data:`NEGATIVE`, and a sentence that says why.
    """
    if _beyond_zero(gain, upwards=not higher_is_better):
        return NEGATIVE, f"Worse than the baseline: all of {gain} is on the bad side of zero."
    if not _beyond_zero(gain, upwards=higher_is_better):
        return NO_EFFECT, f"The difference from the baseline, {gain}, may as well be zero."
    if control is not None and not _beyond_zero(control, upwards=higher_is_better):
        return NO_EFFECT, (
            f"Better than the baseline by {gain}, but not surely better than a shuffled teacher, {control}: "
            "the shuffled teacher gains as much, so what helped is not the teacher's knowledge."
        )
    return ARRIVED, f"Better than the baseline: all of {gain} is on the good side of zero."


def _beyond_zero(interval: Interval, *, upwards: bool) -> bool:
    return interval.low > 0 if upwards else interval.high < 0

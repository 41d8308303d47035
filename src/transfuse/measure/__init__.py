"""Numbers that tell whether a transfer arrived.

Here are accuracy, fidelity, calibration and cost, intervals around them, and the verdict. Everything takes
tensors that were computed before; only :func:`cost` runs a model. Nothing here changes a model, and nothing
here is trained on: losses are in :mod:`transfuse.losses`.
"""

from transfuse.measure.calibration import (
    Reliability,
    brier_score,
    expected_calibration_error,
    reliability,
)
from transfuse.measure.classification import (
    correct,
    negative_log_likelihood,
    per_class_accuracy,
    per_class_gain,
)
from transfuse.measure.cost import Cost, cost
from transfuse.measure.fidelity import agreement, disagreement, held_out_kl
from transfuse.measure.interval import Interval, bootstrap, paired
from transfuse.measure.validators import VALIDATORS
from transfuse.measure.verdict import (
    ARRIVED,
    NEGATIVE,
    NO_EFFECT,
    NOT_COMPARED,
    verdict,
)

__all__ = [
    "ARRIVED",
    "NEGATIVE",
    "NOT_COMPARED",
    "NO_EFFECT",
    "VALIDATORS",
    "Cost",
    "Interval",
    "Reliability",
    "agreement",
    "bootstrap",
    "brier_score",
    "correct",
    "cost",
    "disagreement",
    "expected_calibration_error",
    "held_out_kl",
    "negative_log_likelihood",
    "paired",
    "per_class_accuracy",
    "per_class_gain",
    "reliability",
    "verdict",
]

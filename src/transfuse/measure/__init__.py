"""Numbers that tell whether a transfer arrived.

Functions take tensors that were computed before: accuracy, fidelity, calibration and cost (which runs a model),
intervals around them, and the verdict. Measures (:class:`Measure`, each with a card) look at models with data: how
alike languages rank facts, whether models are fooled alike, what a student knows that its twin does not. Nothing here
changes a model, and nothing here is trained on: losses are in :mod:`transfuse.losses`.
"""

from transfuse.measure.adversarial import AdversarialTransferability
from transfuse.measure.answers import AnswerFidelity
from transfuse.measure.base import Measure, Measurement, Table
from transfuse.measure.calibration import (
    Reliability,
    brier_score,
    expected_calibration_error,
    reliability,
)
from transfuse.measure.candidates import CandidateScorer, Cloze, read_facts
from transfuse.measure.classification import (
    correct,
    negative_log_likelihood,
    per_class_accuracy,
    per_class_gain,
)
from transfuse.measure.continual import (
    average_accuracy,
    backward_transfer,
    final_accuracy,
    forgetting,
    forward_transfer,
    result_matrix,
)
from transfuse.measure.correlation import agreement_with_results, pearson, spearman
from transfuse.measure.cost import Cost, cost
from transfuse.measure.exposure import canary_exposure, laplace_epsilon, sampled_exposure
from transfuse.measure.fidelity import agreement, disagreement, held_out_kl
from transfuse.measure.interval import Interval, bootstrap, paired
from transfuse.measure.probe import linear_transfer
from transfuse.measure.rankc import RankC
from transfuse.measure.unicam import UniCAM
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
    "AdversarialTransferability",
    "AnswerFidelity",
    "CandidateScorer",
    "Cloze",
    "Cost",
    "Interval",
    "Measure",
    "Measurement",
    "RankC",
    "Reliability",
    "Table",
    "UniCAM",
    "agreement",
    "agreement_with_results",
    "average_accuracy",
    "backward_transfer",
    "bootstrap",
    "brier_score",
    "canary_exposure",
    "correct",
    "cost",
    "disagreement",
    "expected_calibration_error",
    "final_accuracy",
    "forgetting",
    "forward_transfer",
    "held_out_kl",
    "laplace_epsilon",
    "linear_transfer",
    "negative_log_likelihood",
    "paired",
    "pearson",
    "per_class_accuracy",
    "per_class_gain",
    "read_facts",
    "reliability",
    "result_matrix",
    "sampled_exposure",
    "spearman",
    "verdict",
]

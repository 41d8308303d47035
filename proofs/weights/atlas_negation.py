"""aTLAS, negation: does one coefficient per tensor forget digits better than one per source, and keep the letters?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proofs.study import Study
from proofs.weights._letters import TASKS, accuracy, base, learned, pictures, split, tuned
from transfuse.weights import ATLAS

TRAINING: dict[str, Any] = {"epochs": 60, "batch_size": 128, "lr": 0.005, "clip": 1.0}
PER_CLASS = 20
"""Samples of every class to learn from."""
ARMS: Mapping[str, tuple[ATLAS | None, tuple[str, ...]]] = {
    "aTLAS": (ATLAS("negation"), tuple(TASKS)),
    "isotropic": (ATLAS("negation", blockwise=False), tuple(TASKS)),
    "aTLAS, digits' vector alone": (ATLAS("negation"), ("digits",)),
    "isotropic, digits' vector alone": (ATLAS("negation", blockwise=False), ("digits",)),
    "base": (None, ()),
}


def trial(seed: int, smoke: bool) -> Mapping[str, Mapping[str, float]]:
    """Coefficients are learned and chosen in some fonts; accuracy is of others."""
    data = {
        "forget": split(pictures("digits", "", "validate", copies=4), PER_CLASS, seed)[0],
        "keep": split(pictures("latin", "", "validate", copies=4), PER_CLASS, seed)[0],
    }
    found = {}
    for arm, (method, tasks) in ARMS.items():
        model = base(smoke)
        if method is not None:
            model = learned(method, [tuned(t, smoke) for t in tasks], model, data, smoke, seed, **TRAINING)
        found[arm] = {
            "accuracy": accuracy(model, pictures("digits", "", "test")),
            "accuracy of letters": accuracy(model, pictures("latin", "", "test")),
        }
    return found


PROOF = Study(
    name="atlas_negation",
    proves=("ATLAS",),
    data=(
        "digits to forget and capital letters to keep, 14x14 pixels: coefficients of eight task vectors are learned "
        f"from {PER_CLASS} drawings of each character in validation fonts, accuracy is of test fonts (320 digits, 830 "
        "letters)"
    ),
    trial=trial,
    arms=tuple(ARMS),
    baseline="isotropic",
    metric="accuracy",
    higher_is_better=False,
    expected=(
        "Accuracy on digits: aTLAS below isotropic, both far below the base, with at least about 95 % of the base's "
        "accuracy on letters left (that bound holds on the data that coefficients are chosen by)"
    ),
    notes="",
)

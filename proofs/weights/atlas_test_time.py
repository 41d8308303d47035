"""aTLAS at test time: do task vectors and unlabelled letters of new fonts suffice to read them better?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proofs.study import Study
from proofs.weights._letters import TASKS, accuracy, base, learned, pictures, tuned
from transfuse.weights import ATLAS

TRAINING: dict[str, Any] = {"epochs": 10, "batch_size": 128, "lr": 0.02, "clip": 1.0}
ARMS: Mapping[str, ATLAS | None] = {
    "ufm": ATLAS("ufm", confidence=0.9),
    "entropy": ATLAS("entropy"),
    "ufm, isotropic": ATLAS("ufm", confidence=0.9, blockwise=False),
    "base": None,
}


def trial(seed: int, smoke: bool, part: str = "test") -> Mapping[str, float]:
    """All letters of the new fonts are seen, none of their labels."""
    inputs, labels = pictures("latin", "italic", part, copies=4)
    found = {}
    for arm, method in ARMS.items():
        model = base(smoke)
        if method is not None:
            model = learned(method, [tuned(t, smoke) for t in TASKS], model, inputs, smoke, seed, **TRAINING)
        found[arm] = accuracy(model, (inputs, labels))
    return found


PROOF = Study(
    name="atlas_test_time",
    proves=("ATLAS",),
    data=(
        "1,768 capital letters at 14x14 pixels in the italic faces of unseen fonts, all without labels to adapt to, "
        "and with labels to test on; base and task vectors are those of the proof `atlas`"
    ),
    trial=trial,
    arms=tuple(ARMS),
    baseline="base",
    metric="accuracy",
    expected="ufm above the base with at least four of five seeds; entropy in between",
    seeds=(0, 1, 2, 3, 4),
    notes="",
)

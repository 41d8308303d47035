"""Nothing that is chosen depends on a label of the target domain (need 19)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from domains import domains
from helpers import CLASSES, CNN, digest, images, trainer
from torch import Tensor, nn

from transfuse.adapt import DANN, Adaptation, ParetoDA, SourceOnly
from transfuse.core.method import Method
from transfuse.measure import correct
from transfuse.measure.validators import VALIDATORS

METHODS: dict[str, Any] = {
    "SourceOnly": SourceOnly,
    "DANN": lambda: DANN(hidden=8),
    "ParetoDA": lambda: ParetoDA(hidden=8, held_out=0.4, extractor_lr=1.0),
}


def chosen(method: Method, target: tuple[Tensor, Tensor], validator: str) -> tuple[str, list[float]]:
    """The state that training ends in, and the scores it was chosen by."""
    held_out, labels = images(40, seed=9)[0], target[1].repeat(2)[:40]

    def validate(model: nn.Module) -> float:
        logits = model.eval()(held_out)
        return float(correct(logits, labels).mean()) if validator == "oracle" else VALIDATORS[validator](logits)

    run = trainer(method, CNN(), None, domains(target), steps=12, lr=1.0, validate=validate, validate_every=2)
    return digest(run.fit()), [record["validate"] for record in run.history if record["validate"] is not None]


def noise() -> tuple[Tensor, Tensor]:
    return torch.randint(CLASSES, (24,), generator=torch.Generator().manual_seed(5)), torch.arange(24) % CLASSES


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("validator", VALIDATORS)
def test_noise_in_the_place_of_target_labels_changes_nothing_chosen(name, validator):
    pictures = images(24)[0]
    one, other = (chosen(METHODS[name](), (pictures, labels), validator) for labels in noise())
    assert one == other
    assert len(set(one[1])) > 1  # there was something to choose from


def test_this_test_can_see_a_choice_by_target_labels():
    pictures = images(24)[0]
    one, other = (chosen(SourceOnly(), (pictures, labels), "oracle") for labels in noise())
    assert one != other


def test_the_best_validated_state_is_the_one_that_is_kept():
    scores = iter([1.0, 5.0, 2.0])
    states: list[str] = []

    def validate(model: nn.Module) -> float:
        states.append(digest(model))
        return next(scores)

    run = trainer(SourceOnly(), CNN(), None, domains(), steps=6, lr=0.5, validate=validate, validate_every=2)
    assert digest(run.fit()) == states[1] != states[2]


def test_the_family_names_a_validator_that_exists():
    assert Adaptation.select in VALIDATORS

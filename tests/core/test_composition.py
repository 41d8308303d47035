from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from helpers import CNN, METHODS, assert_equal_gradients, first_gradients, images, make, trainer
from torch import Tensor, nn

from transfuse.core.card import Card
from transfuse.core.clock import Clock, Cosine, Linear
from transfuse.core.composition import Then
from transfuse.core.errors import MethodError
from transfuse.core.method import Method
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Phase, Stage
from transfuse.distill import KD, RKD, RSKD, AttentionTransfer, Distillation, Hints, Labels, WCoRD
from transfuse.losses import Term

# Two of WCoRD draw different negatives, and RSKD other tokens than alone, so that neither is what it is alone.
OF_IMAGES = [cls for cls in METHODS if "classification" in cls.card.tasks]
PAIRS = [(a, b) for i, a in enumerate(OF_IMAGES) for b in OF_IMAGES[i:] if not a is b is WCoRD and RSKD not in (a, b)]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda c: c.__name__)
def test_a_sum_has_the_gradient_of_the_weighted_sum(first, second):
    def one(method: Method) -> dict[str, Tensor]:
        found = first_gradients(method, CNN(width=8, seed=1), CNN(width=8, seed=2), images())
        return {name: g for name, g in found.items() if name.startswith("CNN")}

    a, b, both = one(make(first)), one(make(second)), one(0.3 * make(first) + 2 * make(second))
    expected = {n: 0.3 * a.get(n, torch.zeros(())) + 2 * b.get(n, torch.zeros(())) for n in both}
    assert_equal_gradients(expected, both)


def test_weights_multiply_and_parts_flatten():
    method = 2 * (KD() + 0.5 * Labels()) + Linear(0, 1) * (3 * RKD())
    clock = Clock(step=5, steps=10)
    weights = [w(clock) if callable(w) else w for w in method.weights]
    assert weights == [2.0, 1.0, 1.5]
    assert [type(m) for m in method.methods] == [KD, Labels, RKD]
    assert repr(KD(2) + 0.5 * Hints("a", "b")) == "KD(temperature=2) + 0.5 * Hints('a', 'b')"


def test_a_schedule_weighs_a_method_over_the_stage():
    weights: list[float] = []

    def note(run: Any, record: Any) -> None:
        weights.append(record["terms"]["labels"]["weighted"] / record["terms"]["labels"]["raw"])

    method = KD(alpha=1.0) + 2 * Cosine(1.0, 0.0) * Labels()
    trainer(method, CNN(), CNN(width=6), images(), steps=4, listener=note).fit()
    expected = [2 * Cosine(1.0, 0.0)(Clock(step=s, steps=4)) for s in range(4)]
    assert weights == pytest.approx(expected)


class Adaptation(Method):
    family = "adapt"

    def loss(self, *arguments: Any) -> dict[str, Term]:
        return {}


class OwnStage(Distillation):
    def stage(self, i: int, run: Any) -> Stage:
        raise NotImplementedError


class OwnLosses(Distillation):
    def losses(self, batches: Any, run: Any) -> dict[str, Term]:
        return {}


def test_methods_of_another_family_do_not_add():
    with pytest.raises(MethodError, match=r"KD and Adaptation do not share a loss and cannot be added.*Then"):
        KD() + Adaptation()
    with pytest.raises(MethodError, match="belongs to no family"):
        0.5 * Then(KD(), Labels())


@pytest.mark.parametrize("cls", [OwnStage, OwnLosses])
def test_methods_with_stages_of_their_own_do_not_add(cls):
    with pytest.raises(MethodError, match=f"{cls.__name__} has stages of its own"):
        KD() + cls()


class Noting(Distillation):
    """Remembers the values that it is told after an update."""

    uses_source = False

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor
        self._told: list[dict[str, float]] = []

    def loss(self, student: Outputs, teacher: Outputs, batch: Any, clock: Clock) -> dict[str, Term]:
        return {"same name": Term.of(self.factor + 0 * student.logits.sum(1))}

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Any) -> None:
        self._told.append({name: float(v) for name, v in values.items()})


def test_each_part_is_told_its_own_raw_values_though_names_collide():
    one, other = Noting(3.0), Noting(7.0)
    run = trainer(KD() + 0.5 * one + 0.1 * other, CNN(), CNN(width=6), images(), steps=2)
    run.fit()
    assert one._told == [{"same name": 3.0}] * 2
    assert other._told == [{"same name": 7.0}] * 2
    assert {"same name", "same name.2"} <= set(run.history[0]["terms"])
    assert run.history[0]["terms"]["same name.2"]["weighted"] == pytest.approx(0.7)


def test_two_methods_of_one_kind_read_their_own_layers():
    both = Hints("layer1", "layer1") + Hints("layer2", "layer2")
    assert both.wants() == {"target": ["layer1", "layer2"], "source": ["layer1", "layer2"]}
    run = trainer(both, CNN(), CNN(width=6), images())
    run.fit()
    assert set(run.history[0]["terms"]) == {"hints", "hints.1"}


def test_a_sum_and_a_sequence_know_what_they_need():
    assert not (Labels() + Labels()).uses_source
    sequence = Then(Hints("a", "b"), KD() + Labels())
    assert sequence.uses_source
    assert [type(part) for part in sequence.parts] == [Hints, KD, Labels]


def test_parts_deploy_one_after_another():
    class Wrap(Distillation):
        def __init__(self, name: str):
            super().__init__()
            self.name = name

        def deploy(self, target: nn.Module) -> nn.Module:
            return nn.Sequential(target, nn.Identity())

    target = nn.Linear(1, 1)
    deployed = (Wrap("a") + Wrap("b")).deploy(target)
    assert deployed[0][0] is target
    assert Then(Wrap("a"), Wrap("b")).deploy(target)[0][0] is target


def test_units_of_all_parts_are_counted():
    class Own(Noting):
        units: ClassVar = {"own": lambda batch: 2.0 * batch.size}

        def loss(self, student: Outputs, *rest: Any) -> dict[str, Term]:
            return {"own": Term(student.logits.sum(), 2.0 * len(student.logits), "own")}

    trainer(KD() + 0.5 * Own(1.0), CNN(), CNN(width=6), images()).fit()
    trainer(Then(KD(), Own(1.0)), CNN(), CNN(width=6), images()).fit()


@pytest.mark.parametrize("cls", METHODS, ids=lambda c: c.__name__)
def test_every_method_has_a_card_of_its_own(cls):
    assert isinstance(cls.__dict__["card"], Card)


@pytest.mark.parametrize(
    "wrong", [{"carries": "magic"}, {"teacher": "logits"}, {"data": "some"}, {"tasks": ("classification", "chess")}]
)
def test_a_card_takes_known_words_only(wrong):
    with pytest.raises(ValueError, match="known are"):
        Card(paper="x", **wrong)


def test_reprs_show_what_differs_from_the_defaults():
    assert repr(KD()) == "KD()"
    assert repr(KD(temperature=2, alpha=0.5)) == "KD(temperature=2, alpha=0.5)"
    assert repr(AttentionTransfer("a", "b", beta=1.0)) == "AttentionTransfer('a', 'b', beta=1.0)"
    assert repr(Labels()) == "Labels()"

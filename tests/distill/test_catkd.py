from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import CLASSES, CNN, digest, images, trainer
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.composition import Then
from transfuse.core.errors import InputError, LayerError, ShapeError, VocabularyError
from transfuse.core.outputs import Outputs
from transfuse.core.run import Run
from transfuse.distill import CATKD, KD, Labels
from transfuse.models import MLP, SmallCNN


def outputs(maps: Tensor, bias: Tensor | float = 0.0) -> Outputs:
    """What a model with these class maps gives."""
    return Outputs(maps.mean((2, 3)) + bias, {"class_maps": maps})


def drawn(rows: int = 4, classes: int = 5, side: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(rows, classes, side, side, generator=torch.Generator().manual_seed(seed))


def distance(method: CATKD, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> float:
    batch = Batch(inputs=torch.zeros(len(student), 1), labels=labels)
    return method.loss(outputs(student), outputs(teacher), batch, Clock())["maps"].mean.item()


CORNER = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
OTHER = torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])


# The equation


def test_two_corners_have_their_closed_form():
    assert distance(CATKD(), CORNER, OTHER) == pytest.approx(0.5)
    assert distance(CATKD(), CORNER, 3 * OTHER) == pytest.approx(2.5)
    for teacher in (OTHER, 3 * OTHER):
        assert distance(CATKD(normalise=True), CORNER, teacher) == pytest.approx(0.5)


def test_is_zero_for_equal_maps():
    for method in (CATKD(), CATKD(normalise=True), CATKD(classes=2), CATKD(size=3)):
        assert distance(method, drawn(), drawn()) == pytest.approx(0.0, abs=1e-9)


def test_does_not_depend_on_the_strength_of_the_teachers_maps_where_normalised_and_else_does():
    student, teacher = drawn(), drawn(seed=1)
    one, other = (distance(CATKD(normalise=True), student, c * teacher) for c in (1.0, 7.0))
    assert one == pytest.approx(other, rel=1e-5)
    assert distance(CATKD(), student, teacher) != pytest.approx(distance(CATKD(), student, 7 * teacher), rel=0.1)


def test_normalises_after_pooling_and_over_both_axes():
    student, teacher = drawn(), drawn(seed=1)
    total = 0.0
    for i in range(4):
        for k in range(5):
            cells = []
            for maps in (student, teacher):
                pooled = torch.nn.functional.avg_pool2d(maps[i : i + 1, k : k + 1], 2).flatten()
                cells.append(pooled / pooled.norm())
            total += (cells[0] - cells[1]).square().mean().item()
    assert distance(CATKD(normalise=True), student, teacher) == pytest.approx(total / 20, rel=1e-5)


def test_one_cell_is_the_squared_difference_of_the_logits():
    student, teacher = drawn(), drawn(seed=1)
    expected = (student.mean((2, 3)) - teacher.mean((2, 3))).square().mean().item()
    assert distance(CATKD(size=1), student, teacher) == pytest.approx(expected, rel=1e-5)


def test_maps_of_different_size_are_pooled_to_the_same_cells():
    small = drawn(side=2)
    large = small.repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert distance(CATKD(), small, large) == pytest.approx(0.0, abs=1e-9)


def test_all_classes_take_part_not_the_true_one_alone():
    student = drawn().requires_grad_()
    batch = Batch(inputs=torch.zeros(4, 1), labels=torch.zeros(4, dtype=torch.long))
    CATKD(labels=0).loss(outputs(student), outputs(drawn(seed=1)), batch, Clock())["maps"].sum.backward()
    assert (student.grad.abs().amax((0, 2, 3)) > 0).all()


# Variants


def test_a_binarised_teacher_is_one_where_it_exceeds_its_mean_absolute_value_before_pooling():
    teacher = torch.tensor([[[[4.0, -4.0], [1.0, 3.0]]]])  # mean absolute value 3, signed mean 1
    expected = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert distance(CATKD(binarise=True), expected, teacher) == 0.0
    student = drawn(1, 1, 2)
    assert distance(CATKD(binarise=True), student, teacher) == pytest.approx(
        (student - expected).square().mean().item()
    )


@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_exactly_so_many_classes_are_matched_those_the_teacher_likes_most_or_least(count, lowest):
    student, teacher = drawn().requires_grad_(), drawn(seed=1)
    method = CATKD(classes=count, lowest=lowest)
    method.loss(outputs(student), outputs(teacher), Batch(inputs=torch.zeros(4, 1)), Clock())["maps"].sum.backward()
    matched = student.grad.abs().amax((2, 3)) > 0
    order = teacher.mean((2, 3)).argsort(1, descending=not lowest)
    assert torch.equal(matched, torch.zeros_like(matched).scatter(1, order[:, :count], True))


def test_without_labels_or_their_weight_only_the_maps_are_left():
    batch = Batch(inputs=torch.zeros(4, 1), labels=torch.tensor([0, 1, -100, 2]))
    found = CATKD(labels=0.5).loss(outputs(drawn()), outputs(drawn(seed=1)), batch, Clock())
    assert float(found["labels"].count) == 3 and found["labels"].weight == 0.5
    assert list(CATKD(labels=0).loss(outputs(drawn()), outputs(drawn()), batch, Clock())) == ["maps"]
    unlabelled = Batch(inputs=torch.zeros(4, 1))
    assert list(CATKD().loss(outputs(drawn()), outputs(drawn()), unlabelled, Clock())) == ["maps"]


def test_without_the_bias_it_is_in_no_term_and_the_student_has_none():
    student, teacher = CNN(), CNN(width=6, seed=1)
    nn.init.constant_(student.fc.bias, 3.0)
    trainer(CATKD(drop_bias=True), student, teacher, images(), optimizer="adamw", weight_decay=0.1).fit()
    assert student.fc.bias.abs().max() == 0
    assert teacher.fc.bias.abs().max() > 0, "the teacher stays as it is"
    batch, bias = Batch(inputs=torch.zeros(4, 1), labels=torch.arange(4)), torch.randn(5)
    found = CATKD(drop_bias=True).loss(outputs(drawn(), bias), outputs(drawn()), batch, Clock())
    plain = CATKD().loss(outputs(drawn()), outputs(drawn()), batch, Clock())
    assert torch.equal(found["labels"].sum, plain["labels"].sum)


def test_the_bias_is_dropped_when_its_turn_comes():
    student = CNN()
    method = Then(Labels(), CATKD(labels=0, drop_bias=True))
    trainer(method, student, CNN(width=6, seed=1), images(), steps=8).fit()
    assert student.fc.bias.abs().max() == 0


def test_a_head_without_a_bias_is_none_to_drop():
    student = CNN()
    student.fc = nn.Linear(8, CLASSES, bias=False)
    trainer(CATKD(drop_bias=True), student, CNN(width=6, seed=1), images()).fit()


# In training


def test_pure_cat_brings_the_students_logits_to_the_teachers_without_labels():
    torch.manual_seed(0)
    teacher, student = CNN(width=6, seed=1), CNN(width=6)
    nn.init.zeros_(teacher.fc.bias)
    inputs = images(24)[0]

    def gap() -> float:
        with torch.no_grad():
            return (student(inputs) - teacher(inputs)).square().mean().item()

    nn.init.zeros_(student.fc.bias)
    before = gap()
    trainer(CATKD(labels=0, drop_bias=True), student, teacher, inputs, steps=300, optimizer="adam", lr=0.01).fit()
    assert gap() < 0.2 * before


def test_the_teacher_receives_no_gradient_and_the_head_of_the_student_does():
    student, teacher = CNN(), CNN(width=6, seed=1)
    before = digest(teacher)
    head = student.fc.weight.clone()
    trainer(CATKD(labels=0), student, teacher, images()[0]).fit()
    assert digest(teacher) == before
    assert all(p.grad is None for p in teacher.parameters())
    assert not torch.equal(student.fc.weight, head)


def test_the_magnitude_is_the_weighted_mean_over_the_first_epoch():
    values: list[float] = []

    def note(run: Any, record: Any) -> None:
        values.append(record["terms"]["maps"]["raw"])

    method = CATKD(beta=3.0)
    trainer(method, CNN(), CNN(width=6, seed=1), images(12), epochs=3, listener=note).fit()
    assert len(values) == 6
    assert method.magnitude == pytest.approx(3.0 * sum(values[:2]) / 2, rel=1e-5)


def test_adds_with_other_methods():
    method = KD(2) + 0.5 * CATKD(labels=0)
    assert repr(method) == "KD(temperature=2) + 0.5 * CATKD(labels=0)"
    run = trainer(method, CNN(), CNN(width=6, seed=1), images())
    run.fit()
    assert {"kd", "labels", "maps"} == set(run.history[0]["terms"])


# What does not fit


def set_up(method: CATKD, student: nn.Module, teacher: nn.Module, inputs: Tensor) -> None:
    run = Run({"target": student, "source": teacher}, {})
    run.install(method.wants())
    run.set_modes(set())
    method.setup(run, Batch(inputs=inputs))


@pytest.mark.parametrize(
    ("method", "student", "teacher", "error", "message"),
    [
        (CATKD(), SmallCNN(width=2, classes=4), SmallCNN(width=2), VocabularyError, "4 classes .* 10"),
        (CATKD(size=3), SmallCNN(width=2), SmallCNN(width=2), ShapeError, "2x2 positions, .* pooled to 3x3"),
        (CATKD(classes=11), SmallCNN(width=2), SmallCNN(width=2), InputError, "classes is 11, the models have 10"),
        (CATKD(), MLP(64, (8,)), SmallCNN(width=2), LayerError, "MLP has no class maps"),
    ],
)
def test_says_what_does_not_fit_before_training(method, student, teacher, error, message):
    with pytest.raises(error, match=message):
        set_up(method, student, teacher, torch.randn(4, 1, 8, 8))


@pytest.mark.parametrize("wrong", [{"beta": -1.0}, {"labels": -0.1}, {"size": 0}, {"classes": 0}])
def test_refuses_arguments_out_of_range(wrong):
    with pytest.raises(InputError, match=f"CATKD: {next(iter(wrong))} is"):
        CATKD(**wrong)

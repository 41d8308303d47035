from __future__ import annotations

from functools import partial

import helpers
import pytest
import torch
from helpers import images, trainer
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, ShapeError, VocabularyError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.core.run import Run
from transfuse.distill import KD, RKD, Distillation, Hints, TopKD, TopKScaled
from transfuse.losses import info_nce, kl_divergence, top_k_decoupled, top_k_linspace, top_k_scaling

CLASSES = 8


class CNN(helpers.CNN):
    def __init__(self, width: int = 4, seed: int = 0):
        super().__init__(width, seed=seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed + 100)
            self.fc = nn.Linear(2 * width, CLASSES)


LABELS = torch.tensor([0, 1, 2, -100, 4, 9])


def drawn(rows: int = 6, classes: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def terms(method: Distillation, student: Tensor, teacher: Tensor, labels: Tensor | None = LABELS) -> Losses:
    batch = Batch(inputs=torch.zeros(len(student), 1), labels=labels)
    return method.loss(Outputs(student), Outputs(teacher), batch, Clock())


PLAIN = {"growth": 0.0, "shift": 0.0, "correction": 1.0}
"""Settings that leave the teacher's logits as they are."""


# The equation


def test_both_losses_compare_the_student_with_the_scaled_teacher():
    student, teacher = drawn(), drawn(seed=1)
    scaled = top_k_scaling(teacher, LABELS, k=4, growth=0.2, correction=2.0, shift=0.3)
    method = TopKD(k=4, growth=0.2, correction=2.0, shift=0.3, alpha=0.5, beta=2.0, temperature=0.2)
    found = terms(method, student, teacher)
    groups = top_k_decoupled(student, scaled, k=4, alpha=0.5, beta=2.0)
    assert torch.allclose(found["decoupled"].mean, groups.mean())
    contrast = partial(info_nce, temperature=0.2)
    assert torch.allclose(found["contrast"].mean, (contrast(student, scaled) + contrast(scaled, student)).mean() / 2)


def test_linspace_takes_the_weights_from_two_to_one():
    student, teacher = drawn(), drawn(seed=1)
    found = terms(TopKD(scaling="linspace"), student, teacher, labels=None)
    expected = top_k_decoupled(student, top_k_linspace(teacher, k=3), k=3)
    assert torch.allclose(found["decoupled"].mean, expected.mean())


def test_unnormalised_rows_are_multiplied_as_they_are():
    student, teacher = drawn(), drawn(seed=1)
    found = terms(TopKD(unit_rows=False, temperature=2.0, **PLAIN), student, teacher)
    scores, truth = student @ teacher.T / 2, torch.arange(6)
    ways = [nn.functional.cross_entropy(s, truth) for s in (scores, scores.T)]
    assert torch.allclose(found["contrast"].mean, sum(ways) / 2)


@pytest.mark.parametrize(("normalise", "least"), [(True, 0.0), (False, -2.0)])
def test_a_multiple_of_the_unscaled_teacher_has_the_least_decoupled_loss(normalise, least):
    found = terms(TopKD(normalise=normalise, **PLAIN), 3 * drawn(), drawn())
    assert found["decoupled"].mean.item() == pytest.approx(least, abs=1e-6)


def test_the_contrast_of_one_sample_is_zero():
    assert terms(TopKD(), drawn(1), drawn(1, seed=1), LABELS[:1])["contrast"].mean.item() == 0.0


def test_the_contrast_vanishes_for_orthogonal_rows_and_a_small_temperature():
    rows = torch.eye(10)[:6] * 5
    assert terms(TopKD(temperature=0.01, **PLAIN), rows, rows)["contrast"].mean.item() == pytest.approx(0.0, abs=1e-6)


def test_centring_makes_it_blind_to_a_constant_added_to_all_logits():
    student, teacher = drawn(), drawn(seed=1)
    shifted = terms(TopKD(centre=True), student + 5, teacher - 7)
    for name, term in terms(TopKD(centre=True), student, teacher).items():
        assert torch.allclose(shifted[name].mean, term.mean, atol=1e-5)
    assert not torch.allclose(terms(TopKD(), student + 5, teacher)["decoupled"].mean, shifted["decoupled"].mean)


def test_weights_stay_apart_and_unlabelled_samples_have_all_but_cross_entropy():
    found = terms(TopKD(decoupled=0.3), drawn(), drawn(seed=1))
    assert found["decoupled"].weight == 0.3
    assert float(found["decoupled"].count) == 6 and float(found["labels"].count) == 5
    assert found["contrast"].unit == "part"


def test_what_weighs_nothing_is_left_out():
    assert list(terms(TopKD(contrast=0), drawn(), drawn(seed=1))) == ["decoupled", "labels"]
    assert list(terms(TopKD(decoupled=0), drawn(), drawn(seed=1))) == ["contrast", "labels"]


def test_gradients_reach_the_student_only():
    student, teacher = drawn().requires_grad_(), drawn(seed=1)
    for name, term in terms(TopKD(), student, teacher).items():
        assert torch.autograd.grad(term.sum, student, retain_graph=True)[0].abs().max() > 0, name


# In front of other methods


def test_scaled_kd_is_kd_towards_the_scaled_teacher():
    student, teacher = drawn(), drawn(seed=1)
    found = terms(TopKScaled(KD(4), k=4, growth=1.0), student, teacher)
    scaled = top_k_scaling(teacher, LABELS, k=4, growth=1.0)
    assert torch.allclose(found["kd"].mean, kl_divergence(student, scaled, temperature=4).mean())
    assert torch.equal(found["labels"].sum, terms(KD(4), student, teacher)["labels"].sum)


def test_without_scaling_it_is_the_method_behind_it():
    student, teacher = drawn(), drawn(seed=1)
    for name, term in terms(TopKScaled(KD(4), **PLAIN), student, teacher).items():
        assert torch.equal(term.sum, terms(KD(4), student, teacher)[name].sum)


def test_the_method_behind_it_is_set_up_trained_and_told_its_values():
    told = []

    class Told(Hints):
        def after_update(self, phase, values, run):
            told.append(set(values))

    method = TopKScaled(KD(4) + 0.5 * Told("layer2", "layer2"))
    student = CNN()
    run = trainer(method, student, CNN(width=6, seed=1), images())
    before = None

    def remember(t, record):
        nonlocal before
        projector = method.method.methods[1].projector.width.weight
        before = projector.clone() if before is None else before

    run.listener = remember
    run.fit()
    assert told == [{"hints"}] * 4
    assert not torch.equal(method.method.methods[1].projector.width.weight, before), "its projector is trained"
    assert set(run.history[0]["terms"]) == {"kd", "labels", "hints"}


def test_features_pass_through_unchanged():
    features = {"penultimate": drawn(6, 4)}
    batch = Batch(inputs=torch.zeros(6, 1), labels=LABELS)
    arguments = Outputs(drawn(), {"penultimate": drawn(6, 3, seed=2)}), Outputs(drawn(seed=1), features), batch, Clock()
    for name, term in RKD().loss(*arguments).items():
        assert torch.equal(TopKScaled(RKD()).loss(*arguments)[name].sum, term.sum)


def test_it_adds_with_other_methods_and_says_what_it_is_made_of():
    method = TopKScaled(KD(2), k=5) + 0.5 * TopKD()
    assert repr(method) == "TopKScaled(KD(temperature=2), k=5) + 0.5 * TopKD()"
    run = trainer(method, CNN(), CNN(width=6, seed=1), images())
    run.fit()
    assert set(run.history[0]["terms"]) == {"kd", "labels", "contrast", "decoupled", "labels.1"}


# What does not fit


def set_up(method: Distillation, student: CNN, teacher: CNN, labels: Tensor | None = None) -> None:
    run = Run({"target": student, "source": teacher}, {})
    run.install(method.wants())
    run.set_modes(set())
    method.setup(run, Batch(inputs=images()[0], labels=labels))


@pytest.mark.parametrize("method", [TopKD(), TopKScaled(KD())])
def test_missing_labels_are_an_error_unless_the_correction_is_off(method):
    with pytest.raises(InputError, match="needs labels, and this data has none: pass correction=1"):
        set_up(method, CNN(), CNN(width=6, seed=1))
    set_up(TopKD(correction=1), CNN(), CNN(width=6, seed=1))
    set_up(TopKScaled(KD(), correction=1), CNN(), CNN(width=6, seed=1))


def test_groups_need_enough_classes():
    with pytest.raises(ShapeError, match=f"TopKD cannot use this batch: k is 4 for {CLASSES} classes"):
        set_up(TopKD(k=4), CNN(), CNN(width=6, seed=1), images()[1])


def test_different_classes_are_refused():
    other = CNN(width=6)
    other.fc = nn.Linear(12, 9)
    with pytest.raises(VocabularyError, match="8 classes"):
        set_up(TopKD(), CNN(), other, images()[1])


@pytest.mark.parametrize("who", ["target", "source"])
def test_logits_without_a_direction_are_refused(who):
    models = {"target": CNN(), "source": CNN(width=6, seed=1)}
    nn.init.zeros_(models[who].fc.weight)
    nn.init.zeros_(models[who].fc.bias)
    with pytest.raises(InputError, match=f"the {who} gives a sample logits that are all zero"):
        set_up(TopKD(), models["target"], models["source"], images()[1])


def test_logits_of_one_sign_must_be_centred():
    teacher = CNN(width=6, seed=1)
    nn.init.constant_(teacher.fc.bias, -50.0)
    with pytest.raises(InputError, match="have the same sign: pass centre=True"):
        set_up(TopKD(), CNN(), teacher, images()[1])
    set_up(TopKD(centre=True), CNN(), teacher, images()[1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 1}, "k of 2 or more.*k=1"),
        ({"growth": -0.1}, "growth=-0.1"),
        ({"correction": 0.5}, "correction=0.5"),
        ({"shift": -1.0}, "shift=-1.0"),
        ({"alpha": -1.0}, "must not be negative"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"scaling": "linspce"}, "did you mean 'linspace'"),
    ],
)
def test_refuses_arguments_out_of_range(wrong, message):
    with pytest.raises(InputError, match=message):
        TopKD(**wrong)

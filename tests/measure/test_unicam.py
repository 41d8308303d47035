from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers import CNN, digest
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from transfuse.core.errors import InputError, LayerError
from transfuse.losses import u_centred, u_correlation, u_removed
from transfuse.measure import Measurement, UniCAM
from transfuse.measure.imputation import impute
from transfuse.measure.unicam import hirescam, unicam

DRAW = torch.Generator().manual_seed(0)
LABELS = torch.arange(24) % 3
IMAGES = torch.rand(24, 1, 4, 4, generator=DRAW) + LABELS.view(-1, 1, 1, 1) * torch.tensor([1.0, 0, 0, 0])[:, None]
DATA = TensorDataset(IMAGES, LABELS)


def look(source: Any = None, target: Any = None, data: Any = DATA, **arguments: Any) -> Measurement:
    source = {"teacher": CNN(6, seed=1), "base": CNN(seed=2)} if source is None else source
    settings = {"layer": "layer1", "batch_size": 12} | arguments
    return UniCAM(**settings).measure(source=source, target=CNN(seed=3) if target is None else target, data=data)


class TestMap:
    A, B = torch.randn(2, 8, 3, 4, 4, generator=DRAW, dtype=torch.float64)
    CLASSES = torch.nn.functional.one_hot(torch.arange(8) % 2).double()

    def test_agrees_with_its_definition(self) -> None:
        a = self.A.clone().requires_grad_()
        j = u_correlation(u_removed(u_centred(a), u_centred(self.B)), u_centred(self.CLASSES))
        (gradient,) = torch.autograd.grad(j, a)
        shown = torch.zeros(8, 4, 4, dtype=torch.float64)
        for i in range(8):
            for c in range(3):
                shown[i] += gradient[i, c].mean() * self.A[i, c]
            shown[i] = shown[i].clamp(min=0)
            shown[i] = (shown[i] - shown[i].min()) / (shown[i].max() - shown[i].min() + 1e-7)
        assert torch.allclose(unicam(self.A, self.B, self.CLASSES, (4, 4)), shown, atol=1e-9)

    def test_the_objective_has_the_right_gradient(self) -> None:
        def objective(a: Tensor) -> Tensor:
            return u_correlation(u_removed(u_centred(a), u_centred(self.B[:6])), u_centred(self.CLASSES[:6]))

        assert torch.autograd.gradcheck(objective, self.A[:6].clone().requires_grad_())

    def test_is_zero_where_the_one_knows_nothing_that_the_other_does_not(self) -> None:
        for a in (self.A, self.A.float()):
            found = unicam(a, a, self.CLASSES, (8, 8))
            assert found.shape == (8, 8, 8) and found.abs().max() == 0

    def test_depends_on_the_other_pictures_of_the_batch(self) -> None:
        mates = self.A.clone()
        mates[4:] = self.A[4:].flip(0) + 1
        maps = [unicam(a, self.B, self.CLASSES, (4, 4))[0] for a in (self.A, mates)]
        assert not torch.allclose(*maps, atol=1e-3)

    def test_a_single_class_is_refused(self) -> None:
        with pytest.raises(InputError, match="single class"):
            unicam(self.A, self.B, torch.ones(8, 2), (4, 4))


class TestImputation:
    IMAGES = torch.rand(3, 2, 9, 7, generator=DRAW, dtype=torch.float64)

    def test_is_the_solution_of_the_linear_system(self) -> None:
        kept = torch.rand(3, 9, 7, generator=DRAW) > 0.6
        found = impute(self.IMAGES, kept, noise=0.0)
        offsets = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
        for n in range(3):
            matrix, right = torch.eye(63, dtype=torch.float64), self.IMAGES[n, 0].flatten().clone()
            for y in range(9):
                for x in range(7):
                    if kept[n, y, x]:
                        continue
                    row = y * 7 + x
                    matrix[row] = 0
                    right[row] = 0
                    for i, j in offsets:
                        if 0 <= y + i < 9 and 0 <= x + j < 7:
                            weight = 1 / 12 if i and j else 1 / 6
                            matrix[row, row] += weight
                            matrix[row, (y + i) * 7 + x + j] -= weight
            expected = torch.linalg.solve(matrix, right).view(9, 7)
            assert torch.allclose(found[n, 0], expected, atol=1e-5)

    def test_what_is_kept_stays_and_what_is_filled_is_noisy(self) -> None:
        kept = torch.zeros(3, 9, 7, dtype=torch.bool)
        kept[:, ::2] = True
        kept[2] = False
        plain, noisy = impute(self.IMAGES, kept, noise=0.0), impute(self.IMAGES, kept)
        assert noisy[:2, :, ::2].equal(self.IMAGES[:2, :, ::2]) and noisy[2].equal(self.IMAGES[2])
        rest = (noisy - plain)[:2, :, 1::2]
        assert rest.std().item() == pytest.approx(0.01, rel=0.4)

    def test_a_plane_is_filled_with_the_plane(self) -> None:
        plane = (torch.arange(9.0)[:, None] + 2 * torch.arange(7.0)).expand(1, 1, 9, 7)
        kept = torch.ones(1, 9, 7, dtype=torch.bool)
        kept[:, 2:6, 2:5] = False
        assert torch.allclose(impute(plane, kept, noise=0.0), plane, atol=1e-4)


def test_hirescam_is_gradient_times_activation_of_the_true_class() -> None:
    model = CNN(seed=1)
    activations, relevance = hirescam(model, "layer1", IMAGES, LABELS)
    a = model.layer1(IMAGES).detach().requires_grad_()
    logits = model.fc(model.layer2(a.tanh()).tanh().mean((2, 3)))
    (gradient,) = torch.autograd.grad(logits[torch.arange(24), LABELS].sum(), a)
    assert torch.allclose(activations, a, atol=1e-6)
    assert torch.allclose(relevance, (gradient * a).sum(1).clamp(min=0), atol=1e-6)


class TestMeasure:
    def test_scores_of_a_student_equal_to_its_teacher(self) -> None:
        teacher = CNN(seed=1)
        found = look({"teacher": teacher, "base": CNN(seed=2)}, CNN(seed=1))
        assert found["fss student"] == pytest.approx(1, abs=0.01)  # the noise of what is filled in is drawn anew
        assert found["rs student"] == pytest.approx(found["rs teacher"], abs=0.01)
        plain = look({"teacher": teacher, "base": CNN(seed=2)}, CNN(seed=1), keep=None)
        assert plain["fss student"] == pytest.approx(1, abs=1e-5) and plain["rs student|teacher"] == 0
        assert plain["fss base"] < 0.999

    def test_without_a_base_student_and_teacher_are_shown(self) -> None:
        found = look(CNN(6, seed=1), keep=None)
        assert set(found.images) == {"student|teacher", "teacher|student"}
        assert set(found.tables["rs"].rows) == {"teacher", "student", "student|teacher", "teacher|student"}

    def test_relevance_is_above_what_shuffled_classes_give(self) -> None:
        found = look(keep=None)
        rs = found.tables["rs"]
        assert rs["student", "absolute"] == abs(found["rs student"])
        assert found["rs student"] > 3 * rs["student", "null"]
        order = torch.randperm(24, generator=DRAW)
        shuffled = look(data=TensorDataset(IMAGES, LABELS[order]), keep=None)
        assert abs(shuffled["rs student"]) < found["rs student"] / 3

    def test_the_numbering_of_classes_does_not_matter(self) -> None:
        renamed = torch.tensor([2, 0, 1])[LABELS]
        one, other = (look(data=TensorDataset(IMAGES, labels), keep=None) for labels in (LABELS, renamed))
        assert one["rs student"] == pytest.approx(other["rs student"], abs=1e-5)

    def test_scores_are_of_all_batches_together_and_maps_of_single_ones(self) -> None:
        one, two = look(batch_size=24, keep=None), look(batch_size=12, keep=None)
        assert one["rs student"] == pytest.approx(two["rs student"], abs=1e-6)
        assert not torch.allclose(one.images["student|base"], two.images["student|base"], atol=1e-3)
        assert two.images["student|base"].shape == (24, 4, 4)
        assert look(maps=5).images["student|base"].shape == (5, 4, 4) and not look(maps=0).images

    def test_embeddings_of_classes_may_be_given(self) -> None:
        line = look(embeddings=[[0.0], [1.0], [5.0]], keep=None)
        assert line["rs student"] != look(keep=None)["rs student"]
        with pytest.raises(InputError, match="2 embeddings of classes, and the data has label 2"):
            look(embeddings=[[0.0], [1.0]])

    def test_progression_compares_layers_of_the_student(self) -> None:
        found = look(progression=["layer2", "layer1"], keep=None)
        assert found["progression layer1"] == pytest.approx(1, abs=1e-5)
        assert 0 < found["progression layer2"] < 1

    def test_layers_without_maps_can_be_scored_as_they_are(self) -> None:
        assert "fss student" in look(layer="penultimate", keep=None, maps=0).numbers
        with pytest.raises(LayerError, match="maps need a layer"):
            look(layer="fc", keep=None)

    def test_batches_without_two_classes_twice_are_skipped_and_counted(self) -> None:
        labels = LABELS.clone()
        labels[:12] = 0
        found = look(data=TensorDataset(IMAGES, labels))
        assert found.notes[0] == "12 samples; 1 batches without two classes of two samples were skipped"
        with pytest.raises(InputError, match="none of 2 batches of 12"):
            look(data=TensorDataset(IMAGES, torch.zeros_like(LABELS)))

    def test_layers_of_other_sizes_are_noted(self) -> None:
        assert any("differ in size" in note for note in look(source_layer="layer2").notes)

    def test_is_json(self) -> None:
        read = json.loads(json.dumps(look().as_dict()))
        assert read["images"]["student|base"]["shape"] == [24, 4, 4]
        assert read["measure"] == "UniCAM(layer='layer1', batch_size=12)"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"source": [CNN(), CNN()]}, "a teacher, or {'teacher'.*found 0, 1"),
            ({"source": {"teacher": CNN(), "bass": CNN()}}, "found teacher, bass"),
            ({"source": DATA}, "source is a model"),
            ({"target": [CNN()]}, "target is one model, found a list"),
            ({"data": IMAGES}, "every sample needs a label"),
            ({"data": TensorDataset(IMAGES, LABELS + 1)}, "has the label 3, and a network tells 3 classes apart"),
            ({"keep": 0.0}, "above 0 and at most 1"),
            ({"batch_size": 3}, "4 pictures or more"),
        ],
    )
    def test_wrong_roles_and_arguments_are_refused(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            look(**arguments)

    def test_models_and_random_numbers_are_left_alone(self) -> None:
        models = [CNN(seed=i, norm=True, dropout=0.5) for i in range(3)]
        models[0].train()
        models[1].eval()
        models[2].fc.weight.grad = torch.ones(3, 8)
        before, state = [digest(m) for m in models], torch.get_rng_state()
        look({"teacher": models[0], "base": models[1]}, models[2])
        assert [digest(m) for m in models] == before and torch.get_rng_state().equal(state)
        assert [m.training for m in models] == [True, False, True]
        assert models[2].fc.weight.grad.equal(torch.ones(3, 8)) and models[0].fc.weight.grad is None
        assert not any(m._forward_hooks for model in models for m in model.modules())
        assert look(keep=None).numbers == look(keep=None).numbers


def test_a_network_that_is_trained_is_measured_in_eval_mode() -> None:
    class Says(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.modes = CNN(), []

        def forward(self, images: Tensor) -> Tensor:
            self.modes.append(self.training)
            return self.inner(images)

    model = Says().train()
    look(model, CNN(), keep=None)
    assert set(model.modes) == {False} and model.training

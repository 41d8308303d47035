"""Cr-KD: assignments, the gated relation, heads, and the matching that scores it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from discover.examples_discover import EXAMPLES, discovery, pictures
from helpers import CNN, digest, trainer
from torch import nn
from torch.utils.data import TensorDataset

from transfuse import transfer
from transfuse.core.batch import Batch
from transfuse.core.errors import InputError, LayerError
from transfuse.core.run import Run
from transfuse.core.streams import as_data
from transfuse.core.trainer import Trainer
from transfuse.discover import CrKD
from transfuse.discover.heads import Prototypes
from transfuse.discover.views import view
from transfuse.losses.clustering import balanced_assignment, gated_relation
from transfuse.measure.discovery import matched


def cosines(samples: int = 40, clusters: int = 5, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(samples, clusters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def crkd(**changes) -> CrKD:
    return CrKD(**({"novel": 3, "heads": 2, "hidden": 8, "width": 6} | changes))


def fitted(method: CrKD, data=None, steps: int = 12, **settings) -> Trainer:
    made = trainer(
        method, CNN(norm=True), None, streams(data), steps=steps, batch_size=9, optimizer="adam", lr=0.01, **settings
    )
    made.fit()
    return made


def streams(data=None) -> dict:
    return {name: as_data(part) for name, part in (data or discovery()).items()}


# Assignments


def test_assignments_add_up_to_one_and_use_the_clusters_equally():
    scores = cosines() / 5  # about the spread of cosines between random vectors of 64 numbers
    few, many = balanced_assignment(scores, iterations=3), balanced_assignment(scores, iterations=100)
    for found, tolerance in ((few, 1e-2), (many, 1e-6)):
        assert torch.allclose(found.sum(1), torch.ones(40, dtype=torch.float64))
        assert (found.mean(0) - 0.2).abs().max() < tolerance


def test_assignments_ignore_a_constant_and_when_converged_one_per_sample():
    z = cosines()
    assert torch.allclose(balanced_assignment(z), balanced_assignment(z + 3.0))
    shifted = z + torch.linspace(0, 0.5, 40, dtype=torch.float64)[:, None]
    assert torch.allclose(
        balanced_assignment(z, iterations=500), balanced_assignment(shifted, iterations=500), atol=1e-6
    )
    assert not torch.allclose(balanced_assignment(z), balanced_assignment(shifted), atol=1e-3)


def test_assignments_do_not_overflow():
    assert balanced_assignment(1000 * cosines().float(), epsilon=0.01).isfinite().all()


@pytest.mark.parametrize(
    ("scores", "epsilon"), [(torch.ones(4, 1), 0.05), (torch.ones(4), 0.05), (torch.ones(4, 2), 0.0)]
)
def test_assignments_refuse_what_cannot_be_assigned(scores, epsilon):
    with pytest.raises(ValueError, match="assignments need"):
        balanced_assignment(scores, epsilon)


# The relation


def test_relation_has_its_hand_value():
    # One known class pair, equal probabilities, a gate that is the same for all: 16 ln 2.
    known, novel = torch.zeros(3, 2), torch.zeros(3, 2)
    assert torch.allclose(gated_relation(known, novel, torch.zeros(3, 2), 4.0), torch.full((3,), 16 * math.log(2)))


def test_relation_is_the_gated_entropy_where_student_equals_teacher_and_pulls_at_nothing():
    known = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    novel = torch.randn(6, 2, dtype=torch.float64)
    value = gated_relation(known, novel, known.detach(), 4.0, detach_gate=True)
    a = (known / 4).softmax(-1)
    w = (torch.cat([known, novel], 1) / 4).softmax(-1)[:, :3].sum(1)
    assert torch.allclose(value, 16 * w / w.mean() * -(a * a.log()).sum(1))
    (gradient,) = torch.autograd.grad(value.sum(), known)
    assert gradient.abs().max() < 1e-12


def test_the_gate_has_mean_one_and_a_gradient_unless_it_is_detached():
    known, novel = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 2, requires_grad=True)
    flat = torch.zeros(2, 3, 5, 4)
    # With a uniform student and teacher the value is T^2 log(4) w.
    gate = gated_relation(flat, novel, flat, 2.0) / (4 * math.log(4))
    assert gate.mean().item() == pytest.approx(1.0, abs=1e-6)
    assert torch.autograd.grad(gated_relation(known, novel, known, 2.0).sum(), novel)[0].abs().max() > 0
    assert not gated_relation(known, novel, known, 2.0, detach_gate=True).requires_grad


def test_relation_needs_samples_and_the_same_classes():
    with pytest.raises(ValueError, match="no unlabelled sample"):
        gated_relation(torch.ones(0, 2), torch.ones(0, 3), torch.ones(0, 2), 4.0)
    with pytest.raises(ValueError, match="know 2 and 3"):
        gated_relation(torch.ones(4, 2), torch.ones(4, 3), torch.ones(4, 3), 4.0)


# The method


def test_without_relation_it_is_clustering_alone_and_labelled_samples_get_no_relation():
    plain, terms = fitted(crkd(alpha=0)), fitted(crkd())
    assert set(plain.history[-1]["terms"]) == {"cluster.0", "cluster.1"}
    assert set(terms.history[-1]["terms"]) == {"cluster.0", "cluster.1", "relation"}


def test_labelled_samples_contribute_nothing_to_the_relation():
    method, run = crkd(), Run({"target": CNN()}, streams())
    run.install(method.wants())
    run.set_modes({"target"})
    method.setup(run, None)
    method.begin_discovery(run)
    found = []
    inputs, labels = pictures([0, 1], 9)
    for given in (labels, 1 - labels, torch.full_like(labels, -100)):
        torch.manual_seed(0)
        labelled = Batch(inputs=inputs, labels=given)
        found.append(method.losses({"labelled": labelled, "unlabelled": Batch(inputs=torch.ones(9, 1, 4, 4))}, run))
    assert len({terms["relation"].sum.item() for terms in found}) == 1
    assert len({terms["cluster.0"].sum.item() for terms in found}) == 3


def test_the_teacher_is_the_model_of_the_known_classes_and_stays():
    seen = []

    class Watched(CrKD):
        def begin_discovery(self, run):
            super().begin_discovery(run)
            seen.append((digest(self.teacher), digest(run["target"])))

    run = fitted(Watched(novel=3, heads=1, hidden=8, width=6))
    assert seen[0][0] == seen[0][1] == digest(run.method.teacher)
    assert digest(run.run["target"]) != seen[0][1]
    assert all(p.grad is None for p in run.method.teacher.parameters())


def test_prototypes_keep_length_one():
    run = fitted(crkd())
    for head in (run.method.known_head, *(h.prototypes for h in run.method.novel_heads)):
        assert isinstance(head, Prototypes)
        assert torch.allclose(head.weight.norm(dim=1), torch.ones(len(head.weight)), atol=1e-6)


def test_the_best_head_is_the_one_with_the_lowest_sum_of_losses():
    method = crkd()
    method.head_losses = torch.tensor([3.0, 2.0])
    assert method.best_head == 1
    run = fitted(crkd())
    sums = run.method.head_losses
    assert sums.min() > 0
    assert run.method.best_head == int(sums.argmin())


def test_labels_of_the_unlabelled_data_are_not_looked_at():
    inputs, labels = pictures([2, 3, 4], 24, seed=1)
    hashes = []
    for made_up in (labels, torch.randint(5, labels.shape), None):
        unlabelled = TensorDataset(inputs) if made_up is None else TensorDataset(inputs, made_up)
        run = fitted(crkd(), {**discovery(), "unlabelled": unlabelled})
        hashes.append(digest(run.run["target"]))
    assert len(set(hashes)) == 1


def test_all_old_and_new_are_in_the_report():
    example = EXAMPLES["CrKD"]()
    report = transfer(
        example.method, target=example.target, data=example.data, test=example.test, **example.options
    ).report
    sets = report.method_arm.runs[0].sets
    assert set(sets) == {"old", "new"}
    pooled = (8 * sets["old"] + 9 * sets["new"]) / 17
    assert report.method_arm.runs[0].value == pytest.approx(pooled)


def test_it_finds_clusters_that_are_there():
    result = transfer(
        CrKD(novel=3, heads=1, hidden=16, width=8),
        target=CNN(width=8, norm=True),
        data={
            "labelled": TensorDataset(*pictures([0, 1], 60)),
            "unlabelled": TensorDataset(*pictures([2, 3, 4], 90, 1)),
        },
        test={"new": TensorDataset(*pictures([2, 3, 4], 30, seed=3))},
        steps=150,
        batch_size=30,
        lr=0.01,
        optimizer="adam",
    )
    with torch.no_grad():
        inputs, labels = pictures([2, 3, 4], 30, seed=3)
        novel = result.model(inputs)[:, 2:].argmax(1)
    assert matched(novel, labels - 2, 0).float().mean() > 0.6  # a third is chance


@pytest.mark.parametrize(
    "wrong",
    [{"novel": 1}, {"views": 1}, {"heads": 0}, {"tau": 0.0}, {"pretrain": 1.0}, {"alpha": -1.0}, {"temperature": 0.0}],
)
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match="CrKD"):
        crkd(**wrong)


def test_wrong_data_is_refused_before_training():
    with pytest.raises(InputError, match='data={"labelled"'):
        fitted(crkd(), {"labelled": TensorDataset(*pictures([0, 1]))})
    with pytest.raises(InputError, match=r"without a gap, found \[0, 2\]"):
        fitted(crkd(), {**discovery(), "labelled": TensorDataset(*pictures([0, 2]))})
    with pytest.raises(LayerError):
        trainer(crkd(), nn.Sequential(nn.Flatten(), nn.ReLU()), None, streams(), steps=2, batch_size=9).fit()


def test_a_batch_smaller_than_the_novel_classes_is_refused():
    with pytest.raises(InputError, match="2 unlabelled samples for 3 novel classes"):
        trainer(crkd(), CNN(), None, streams(), steps=8, batch_size=2).fit()


def test_a_class_that_nobody_said_is_refused_when_testing():
    method = crkd()
    method.known = 2
    with pytest.raises(InputError, match="class 5: 2 known and 3 novel"):
        method.correct(torch.zeros(1, 5), torch.tensor([5]))


# Views and matching


def test_views_keep_the_shape_and_differ():
    images = torch.rand(4, 2, 8, 8)
    for small in (False, True):
        seen = view(images, small)
        assert seen.shape == images.shape
        assert seen.isfinite().all()
        assert not torch.equal(seen, view(images, small))
    rows = torch.rand(4, 5)
    assert (view(rows) - rows).abs().max() < 0.5


def test_matching_does_not_depend_on_the_numbers_of_the_clusters():
    draw = torch.Generator().manual_seed(0)
    labels, predictions = (torch.randint(6, (200,), generator=draw) for _ in range(2))
    for known in (0, 2):
        scores = {
            int(matched(torch.tensor([*range(known), *order])[predictions], labels, known).sum())
            for order in itertools.permutations(range(known, 6))
        }
        assert len(scores) == 1


def test_matching_is_the_best_of_all_permutations():
    draw = torch.Generator().manual_seed(1)
    labels, predictions = (torch.randint(4, (50,), generator=draw) for _ in range(2))
    best = max(int((torch.tensor(order)[predictions] == labels).sum()) for order in itertools.permutations(range(4)))
    assert int(matched(predictions, labels, 0).sum()) == best


def test_matching_never_maps_between_known_and_novel():
    right = matched(torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0, 0, 3, 1, 2]), known=2)
    assert right.tolist() == [True, False, True, False, False]

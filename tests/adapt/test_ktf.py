"""KTF: its objective against independent ones, symmetries, full batches, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import first_gradients, trainer
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.adapt import KTF
from transfuse.core.errors import InputError, ShapeError
from transfuse.core.phases import Losses
from transfuse.core.run import Run
from transfuse.core.streams import Data, as_data
from transfuse.losses import IGNORE
from transfuse.models import SphereClassifier

CLASSES, WIDTH = 3, 8
TERMS = ("labels", "source", "alignment", "decay")


def model() -> SphereClassifier:
    torch.manual_seed(0)
    made = SphereClassifier(inputs=6, width=WIDTH, classes=CLASSES)
    for p in made.parameters():
        nn.init.normal_(p, std=0.5)
    return made


def target_data() -> tuple[Tensor, Tensor]:
    """Twenty samples, the first six with labels."""
    labels = torch.full((20,), IGNORE)
    labels[:6] = torch.arange(6) % CLASSES
    return torch.randn(20, 6, generator=torch.Generator().manual_seed(1)), labels


def source_data() -> tuple[Tensor, Tensor]:
    return torch.randn(15, WIDTH, generator=torch.Generator().manual_seed(2)), torch.arange(15) % CLASSES


def streams(target: Any = None, source: Any = None) -> dict[str, Data]:
    return {
        "data": as_data(target_data() if target is None else target),
        "source": as_data(source_data() if source is None else source),
    }


def run_of(net: nn.Module, target: Any = None, source: Any = None) -> Run:
    return Run({"target": net}, streams(target, source))


def terms(method: KTF, net: nn.Module, target: Any = None, source: Any = None) -> Losses:
    run = run_of(net, target, source)
    run.install(method.wants())
    whole = {"target": run.data["data"].sample(1000), "source": run.data["source"].sample(1000)}
    assert all(whole.values())
    return method.losses(whole, run)  # type: ignore[arg-type]


def values(found: Losses) -> dict[str, float]:
    return {name: term.mean.item() for name, term in found.items()}


def objective(found: Losses) -> Tensor:
    return torch.stack([term.weight * term.mean for term in found.values()]).sum()


# The objective


def test_agrees_with_a_float64_loop_written_from_the_formula():
    net = model()
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in net.parameters())
    x, y = target_data()[0].double().numpy(), target_data()[1].tolist()
    p, ys = source_data()[0].double().numpy(), source_data()[1].tolist()

    def unit(row: np.ndarray) -> np.ndarray:
        return row / np.sqrt((row**2).sum())

    def g(row: np.ndarray) -> np.ndarray:
        h = w1 @ unit(row) + b1
        return unit(np.where(h > 0, h, 0.2 * h))

    def probabilities(row: np.ndarray) -> np.ndarray:
        e = np.exp(w2 @ row + b2)
        return e / e.sum()

    z, p = [g(row) for row in x], [unit(row) for row in p]
    q = [np.eye(CLASSES)[k] if k != IGNORE else probabilities(row) for row, k in zip(z, y, strict=True)]
    alignment = ((np.mean(p, 0) - np.mean(z, 0)) ** 2).sum()
    for k in range(CLASSES):
        here = np.mean([row for row, label in zip(p, ys, strict=True) if label == k], 0)
        there = sum(qi[k] * row for qi, row in zip(q, z, strict=True)) / sum(qi[k] for qi in q)
        alignment += ((here - there) ** 2).sum()
    expected = {
        "labels": np.mean([-np.log(probabilities(row)[k]) for row, k in zip(z, y, strict=True) if k != IGNORE]),
        "source": np.mean([-np.log(probabilities(row)[k]) for row, k in zip(p, ys, strict=True)]),
        "alignment": alignment / (CLASSES + 1),
        "decay": (w1**2).sum() + (w2**2).sum(),
    }
    found = terms(KTF(beta=0.3, mu=0.7, tau=0.2), net)
    assert values(found) == pytest.approx(expected, rel=1e-4)
    assert {n: t.weight for n, t in found.items()} == {"labels": 1.0, "source": 0.3, "alignment": 0.7, "decay": 0.1}


def test_without_source_and_alignment_gradients_are_those_of_the_target_only_network():
    net = model()
    x, y = target_data()
    known = y != IGNORE
    loss = F.cross_entropy(net(x[known]), y[known])
    loss = loss + 0.05 / 2 * (net.project.weight.square().sum() + net.fc.weight.square().sum())
    expected = torch.autograd.grad(loss, list(net.parameters()))
    found = first_gradients(KTF(beta=0, mu=0), copy.deepcopy(net), None, streams())
    for gradient, (name, _) in zip(expected, net.named_parameters(), strict=True):
        assert torch.allclose(found[f"SphereClassifier.{name}"], gradient, atol=1e-6), name


def test_renaming_the_classes_together_with_the_head_changes_nothing():
    net, renamed = model(), model()
    new = torch.tensor([2, 0, 1])  # class k is now called new[k]
    with torch.no_grad():
        renamed.fc.weight[new] = net.fc.weight
        renamed.fc.bias[new] = net.fc.bias
    (x, y), (p, ys) = target_data(), source_data()
    one = terms(KTF(), net)
    other = terms(KTF(), renamed, (x, torch.where(y == IGNORE, IGNORE, new[y.clamp_min(0)])), (p, new[ys]))
    assert values(other) == pytest.approx(values(one), rel=1e-5)


def test_renaming_the_sources_classes_changes_its_labels_term_and_the_pairing_alone():
    net = model()
    p, ys = source_data()
    one, other = values(terms(KTF(), net)), values(terms(KTF(), net, source=(p, (ys + 1) % CLASSES)))
    assert other["labels"] == one["labels"] and other["decay"] == one["decay"]
    assert other["source"] != pytest.approx(one["source"], rel=1e-3)
    assert other["alignment"] != pytest.approx(one["alignment"], rel=1e-3)
    # A source whose classes all have one mean is aligned alike under every naming: M0 sees no labels.
    same = p[ys == 0].repeat(3, 1), torch.arange(3).repeat_interleave(5)
    moved = same[0], (same[1] + 1) % CLASSES
    found = [values(terms(KTF(), net, source=s))["alignment"] for s in (same, moved)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_the_size_of_source_vectors_does_not_matter():
    p, ys = source_data()
    net = model()
    assert values(terms(KTF(), net, source=(100 * p, ys))) == pytest.approx(values(terms(KTF(), net)), rel=1e-5)


def test_soft_labels_carry_gradient_unless_it_is_stopped():
    net = model()

    def gradient(method: KTF) -> tuple[Tensor, Tensor]:
        alignment = terms(method, net)["alignment"].mean
        found = torch.autograd.grad(alignment, [net.fc.weight, net.project.weight], allow_unused=True)
        return tuple(torch.zeros(1) if f is None else f for f in found)

    through, stopped = gradient(KTF()), gradient(KTF(stop_grad=True))
    assert through[0].abs().max() > 1e-4  # the head is reached through q alone
    assert stopped[0].abs().max() == 0
    assert stopped[1].abs().max() > 1e-4
    assert values(terms(KTF(stop_grad=True), net)) == values(terms(KTF(), net))


def test_weight_matrices_decay_and_biases_do_not():
    net = model()
    terms(KTF(), net)["decay"].mean.backward()
    for name, p in net.named_parameters():
        expected = None if name.endswith("bias") else 2 * p
        assert expected is p.grad is None or torch.equal(p.grad, expected), name


# The run


def test_every_update_sees_both_domains_whole_whatever_the_batch_size():
    sizes = []

    class Watched(KTF):
        def losses(self, batches: Any, run: Any) -> Losses:
            sizes.append((batches["target"].size, batches["source"].size))
            return super().losses(batches, run)

    trainer(Watched(), model(), None, streams(), steps=3, batch_size=4).fit()
    assert sizes == [(20, 15)] * 3


def test_the_trained_target_needs_no_source_and_lowers_the_objective():
    net = model()
    before = objective(terms(KTF(), net)).item()
    trained = trainer(KTF(), net, None, streams(), steps=40, optimizer="adam", lr=0.02, weight_decay=0.0).fit()
    assert trained is net
    assert net(target_data()[0]).shape == (20, CLASSES)
    assert objective(terms(KTF(), net)).item() < 0.8 * before


def test_micro_batches_are_refused():
    with pytest.raises(InputError, match="leave out micro_batch|micro-batches"):
        trainer(KTF(), model(), None, streams(), micro_batch=8).fit()


# What cannot work


def relabelled(value: int) -> tuple[Tensor, Tensor]:
    x, y = target_data()
    return x, torch.where(y == 1, value, y)


def broken() -> tuple[Tensor, Tensor]:
    p, ys = source_data()
    p[4, 2] = float("nan")
    return p, ys


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        (relabelled(IGNORE), None, r"'data' needs labels of each.*missing: \[1\]"),
        (relabelled(3), None, r"'data' needs labels of each.*missing: \[1\], unknown: \[3\]"),
        (target_data()[0], None, r"'data' needs labels of each.*missing: \[0, 1, 2\]"),
        (None, (source_data()[0], source_data()[1] % 2), r"'source' needs labels of each.*missing: \[2\]"),
        (None, (source_data()[0], torch.arange(15) % 4), r"'source' needs labels of each.*unknown: \[3\]"),
        (None, (source_data()[0], torch.cat([source_data()[1][:-1], torch.tensor([IGNORE])])), "1 of them have no lab"),
        (None, (source_data()[0][:, :-1], source_data()[1]), "the head of the target reads 8 features.* has 7"),
        (None, broken(), "1 samples of 'source' hold values that are not finite, the first is 4"),
        (None, [(source_data()[0], source_data()[1])], "found batches that somebody else makes"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_training(target, source, message):
    with pytest.raises(InputError, match=message):
        trainer(KTF(), model(), None, streams(target, source)).fit()


def test_a_model_whose_features_have_other_lengths_is_refused():
    net = nn.Sequential(nn.Linear(6, WIDTH), nn.Linear(WIDTH, CLASSES))
    with pytest.raises(ShapeError, match="features of length 1"):
        trainer(KTF(), net, None, streams()).fit()


def test_a_missing_source_is_named():
    with pytest.raises(InputError, match="reads all of 'source' in every update, found nothing"):
        trainer(KTF(), model(), None, {"data": as_data(target_data())}).fit()


@pytest.mark.parametrize("weight", ["beta", "mu", "tau"])
def test_negative_weights_are_refused(weight):
    with pytest.raises(InputError, match="none may be negative"):
        KTF(**{weight: -0.1})

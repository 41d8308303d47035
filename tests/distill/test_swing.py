"""Swing distillation against the invariants of its sheet, and the exposure that it is judged by."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.distill import Swing
from transfuse.distill.swing import exposure_scores, rule_scores, tagger_scores
from transfuse.losses import cross_entropy, kl_divergence
from transfuse.measure.exposure import canary_exposure, laplace_epsilon, sampled_exposure

ROWS, TOKENS, CLASSES = 4, 6, 9


def text(private: Tensor | float) -> tuple[Tensor, Tensor, Batch]:
    torch.manual_seed(0)
    student, teacher = torch.randn(ROWS, TOKENS, CLASSES, requires_grad=True), 2 * torch.randn(ROWS, TOKENS, CLASSES)
    labels = torch.randint(CLASSES, (ROWS, TOKENS))
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    mask[:, -1] = False
    scores = private if isinstance(private, Tensor) else torch.full((ROWS, TOKENS), private)
    inputs = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    return student, teacher, Batch(inputs=inputs, labels=labels, mask=mask, privacy=scores, index=torch.arange(ROWS))


def loss(method: Swing, student: Tensor, teacher: Tensor, batch: Batch) -> Any:
    return method.loss(Outputs(student), Outputs(teacher), batch, Clock())


def test_where_nothing_is_private_it_is_plain_distillation():
    student, teacher, batch = text(0.0)
    found = loss(Swing(low=2.0, squared=True), student, teacher, batch)
    wanted = kl_divergence(student, teacher, temperature=2.0)[batch.mask].sum()
    assert found["swing"].sum.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert found["labels"].sum.item() == pytest.approx(
        cross_entropy(student, batch.labels)[batch.mask].sum().item(), rel=1e-5
    )


def test_the_hotter_the_flatter_until_the_target_is_uniform():
    student, teacher, batch = text(1.0)
    found = loss(Swing(high=1e6, noise=0.0), torch.zeros_like(student), teacher, batch)
    assert found["swing"].sum.item() == pytest.approx(0.0, abs=1e-4)
    entropies = []
    for u in (0.0, 0.3, 0.7, 1.0):
        p = (teacher / (1 + 9 * u)).softmax(-1)
        entropies.append(float(-(p * p.log()).sum()))
    assert entropies == sorted(entropies)


def test_labels_of_private_tokens_never_reach_the_student():
    private = torch.zeros(ROWS, TOKENS)
    private[:, 3] = 0.9
    student, teacher, batch = text(private)
    (gradient,) = torch.autograd.grad(loss(Swing(), student, teacher, batch)["labels"].sum, student)
    assert (gradient[:, 2] == 0).all()  # what is predicted there is the private token
    assert gradient[:, 1].abs().max() > 0
    assert gradient[:, 3].abs().max() > 0


def test_targets_are_distributions_and_the_noise_of_a_text_stays_the_same():
    _, teacher, batch = text(1.0)
    for kind in ("laplace", "gaussian"):
        method = Swing(noise=0.3, kind=kind)
        rows = teacher[batch.mask].softmax(-1)
        private = torch.ones(len(rows))
        target = method._noisy(rows, private, batch.mask, batch)
        assert (target >= 0).all()
        assert torch.allclose(target.sum(-1), torch.ones(len(rows)))
        assert torch.equal(target, method._noisy(rows, private, batch.mask, batch))
        other = Batch(batch, index=batch.index + 1)
        assert not torch.equal(target, method._noisy(rows, private, batch.mask, other))
        backwards = Batch(batch, index=batch.index.flip(0))
        turned = method._noisy(rows.view(ROWS, -1, CLASSES).flip(0).flatten(0, 1), private, batch.mask, backwards)
        assert torch.equal(turned.view(ROWS, -1, CLASSES).flip(0).flatten(0, 1), target)
    untouched = method._noisy(rows, torch.zeros(len(rows)), batch.mask, batch)
    assert torch.equal(untouched, rows)


def test_the_noise_has_mean_zero():
    method = Swing(noise=0.001)
    p = torch.full((10_000, 3), 1 / 3)
    mask = torch.ones(10_000, 1, dtype=torch.bool)
    batch = Batch(inputs=mask, index=torch.arange(10_000))
    noise = method._noisy(p, torch.ones(10_000), mask, batch) - p
    error = 0.001 * math.sqrt(2) / 100
    assert (noise.mean(0).abs() < 3 * error).all()


def test_exposure_at_its_ends_with_ties_and_sampled():
    losses = torch.arange(1024.0)
    assert canary_exposure(losses, 0) == pytest.approx(10.0)
    assert canary_exposure(losses, 1023) == pytest.approx(0.0)
    assert canary_exposure(torch.zeros(1024), 5) == pytest.approx(10 - math.log2(512.5))
    drawn = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    assert sampled_exposure(drawn, -2.0) == pytest.approx(-math.log2(0.02275), abs=0.5)
    assert laplace_epsilon(0.5) == 4.0
    assert laplace_epsilon(0.0) == math.inf
    for wrong in ((torch.tensor([1.0, math.nan]), 0), (losses, 2000)):
        with pytest.raises(InputError, match="secret"):
            canary_exposure(*wrong)


def test_a_token_looks_private_where_only_the_teacher_knows_it():
    scores = exposure_scores(torch.tensor([0.1, 3.0]), torch.tensor([9.0, 3.0]))
    assert scores[0] > 0.99
    assert scores[1] < 0.05


def test_wrong_arguments_and_data_are_refused():
    for wrong in ({"low": 0.0}, {"low": 5.0, "high": 2.0}, {"noise": -1.0}, {"alpha": 2.0}, {"kind": "cauchy"}):
        with pytest.raises(InputError, match="Swing"):
            Swing(**wrong)
    student, teacher, batch = text(2.0)
    with pytest.raises(InputError, match=r"values from 2 to 2: expected \(4, 6\)"):
        loss(Swing(), student, teacher, batch)
    del batch["privacy"]
    with pytest.raises(InputError, match="Swing needs 'privacy'"):
        loss(Swing(), student, teacher, batch)


def test_rules_mark_every_token_that_touches_a_match():
    text = "write to ann@example.org, code 417."
    words = re.findall(r"\S+|\s", text)
    ends = [sum(map(len, words[: i + 1])) for i in range(len(words))]
    private = rule_scores(text, ends)
    assert [w for w, p in zip(words, private.tolist(), strict=True) if p] == ["ann@example.org,", "417."]
    halves = rule_scores("417", [1, 3])
    assert halves.tolist() == [1.0, 1.0]


def test_a_tagger_gives_the_probability_of_its_private_classes():
    logits = torch.log(torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]]))
    assert torch.allclose(tagger_scores(logits, [1, 2]), torch.tensor([[0.5, 0.9]]))
    with pytest.raises(InputError, match="private classes"):
        tagger_scores(logits, [3])

"""AXIS: what the sheet says must hold exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import CNN, digest
from torch import nn
from weights.composing import INPUTS, LABELS, logits, plain, total, tuned

from transfuse import transfer
from transfuse.core.batch import Batch
from transfuse.core.errors import InputError
from transfuse.core.run import Run
from transfuse.core.streams import as_data
from transfuse.weights import AXIS, Linear
from transfuse.weights.axis import pool
from transfuse.weights.factors import Factors

BATCH = Batch(inputs=INPUTS, labels=LABELS)


def ready(method: AXIS, sources: Any = None, base: nn.Module | None = None) -> Run:
    base = CNN(norm=True) if base is None else base
    sources = [tuned(base, s) for s in (1, 2, 3)] if sources is None else sources
    roles = {"target": base, **{f"source.{i}": m for i, m in enumerate(sources)}}
    run = Run(roles, {"data": as_data((INPUTS, LABELS))})
    run.set_modes(set())
    method.setup(run, BATCH)
    return run


def matrices(count: int, rows: int = 6, columns: int = 8) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(rows, columns, generator=draw) for _ in range(count)]


# The merge


def test_one_source_with_all_terms_is_that_source():
    run = ready(method := AXIS(rank=1.0), [tuned(CNN(norm=True), 1)])
    assert torch.allclose(logits(method, run), plain(run["source.0"]), atol=1e-5)
    for name, p in method.deploy(run["target"]).named_parameters():
        assert torch.allclose(p, run["source.0"].get_parameter(name), atol=1e-5), name


def test_terms_are_ranked_over_all_sources_and_reading_one_by_one_is_the_same():
    changes = matrices(3)
    whole = [Factors.of(c) for c in changes]
    values = torch.cat([f.s for f in whole]).sort(descending=True).values[:5]
    kept = pool(iter(changes), 5)
    assert torch.allclose(kept.s, values, atol=1e-6)
    expected = sum(f.take(f.s >= values[-1] - 1e-6).dense() for f in whole)
    assert torch.allclose(kept.dense(), expected, atol=1e-5)
    assert torch.allclose(pool(iter(changes[::-1]), 5).dense(), expected, atol=1e-5)


def test_equal_sources_double_the_merge():
    (change,) = matrices(1)
    once, twice = pool(iter([change]), 3).orthogonal(), pool(iter([change, change]), 6).orthogonal()
    assert torch.allclose(twice.s[:3], 2 * once.s, atol=1e-4)


def test_noise_below_the_last_kept_value_changes_nothing_and_above_takes_its_place():
    changes = matrices(2)
    kept = pool(iter(changes), 4)
    noise = torch.randn(6, 8, generator=torch.Generator().manual_seed(9))
    noise = noise / torch.linalg.matrix_norm(noise, 2)
    below, above = 0.9 * kept.s[-1] * noise, 5 * kept.s[0] * noise
    assert torch.allclose(pool(iter([*changes, below]), 4).dense(), kept.dense(), atol=1e-5)
    loud = pool(iter([*changes, above]), 4)
    assert loud.s[0].item() == pytest.approx(5 * kept.s[0].item(), rel=1e-4)
    assert not torch.allclose(loud.dense(), kept.dense(), atol=1e-1)


def test_what_is_no_matrix_gets_the_mean_change():
    run = ready(method := AXIS())
    mean = torch.stack([run[f"source.{i}"].fc.bias - run["target"].fc.bias for i in range(3)]).mean(0)
    assert torch.allclose(method.deploy(run["target"]).fc.bias, run["target"].fc.bias + mean, atol=1e-6)


@pytest.mark.parametrize("merge", [Linear(), Linear([0.5, 0.3, 0.2]), "base"])
def test_any_merge_can_be_tuned_and_at_first_answers_as_it_does(merge):
    run = ready(method := AXIS(merge=merge))
    expected = run["target"]
    if merge != "base":
        expected = transfer(merge, [run[f"source.{i}"] for i in range(3)], expected, test=(INPUTS, LABELS)).model
        expected.norm.load_state_dict(run["target"].norm.state_dict() | dict(expected.norm.named_parameters()))
        expected.norm.running_mean.copy_(run["target"].norm.running_mean)
        expected.norm.running_var.copy_(run["target"].norm.running_var)
    assert torch.allclose(logits(method, run), plain(expected), atol=1e-5)


# Tuning


def test_the_gradient_of_a_singular_value_is_its_directions_product_with_the_gradient():
    run = ready(method := AXIS(rank=0.5, tuned=0.5))
    total(method.loss({"data": BATCH}, run)).backward()
    composed = {n: p.detach().requires_grad_() for n, p in method.deploy(run["target"]).named_parameters()}
    known = LABELS >= 0
    value = nn.functional.cross_entropy(run("target", BATCH, params=composed).logits[known], LABELS[known])
    for name, slope in zip(composed, torch.autograd.grad(value, list(composed.values())), strict=True):
        if slope.dim() < 2:
            continue
        key = name.replace(".", "/")
        rows = method.fixed[f"{key}:trained"]
        u, v = (method.fixed[f"{key}:{n}"][:, rows] for n in "uv")
        expected = torch.einsum("rk,rc,ck->k", u, slope.flatten(1), v)
        assert torch.allclose(method.values[f"{key}:lambda"].grad, expected, atol=1e-5), name


def test_only_singular_values_and_the_head_are_trained_whatever_the_number_of_sources():
    counts = []
    base = CNN(norm=True)
    for models in (2, 5):
        method = AXIS(rank=0.5, tuned=0.5, head="fc")
        run = ready(method, [tuned(base, s) for s in range(models)], base)
        (phase,) = method.stage(0, run).trained
        assert set(phase.params) == {*method.values.parameters(), *base.fc.parameters()}
        assert phase.groups[0]["weight_decay"] == 0.0 and phase.groups[1]["lr_scale"] == 0.01
        counts.append((sum(p.numel() for p in phase.params), sum(b.numel() for b in method.fixed.buffers())))
    assert counts[0] == counts[1]
    assert counts[0][0] == 2 + 4 + 27  # half of min(4, 9) and of min(8, 36), and the head


def test_more_values_than_terms_are_trained_along_a_completed_basis():
    run = ready(method := AXIS(rank=0.2, tuned=1.0))
    values = method.values["layer2/weight:lambda"]
    assert len(values) == 8 and values[2:].eq(0).all() and values[:2].gt(0).all()
    base = AXIS(rank=0.2, tuned=0.2)
    ready(base)
    assert torch.allclose(
        method.compose(run["target"])["layer2.weight"], base.compose(run["target"])["layer2.weight"], atol=1e-6
    )
    total(method.loss({"data": BATCH}, run)).backward()
    assert values.grad[2:].abs().max() > 1e-5


def test_a_matrix_that_no_source_has_changed_is_not_tuned():
    base = CNN(norm=True)
    sources = [tuned(base, s) for s in (1, 2)]
    for model in sources:
        model.fc.load_state_dict(base.fc.state_dict())
    run = ready(method := AXIS(tuned=1.0), sources, base)
    assert "fc/weight:lambda" not in method.values
    assert torch.equal(method.deploy(run["target"]).fc.weight, base.fc.weight)


def test_which_values_are_trained():
    found = {}
    for order in ("top", "random", "bottom"):
        method = AXIS(rank=1.0, tuned=0.5, order=order)
        ready(method)
        found[order] = method.fixed["layer2/weight:trained"].tolist()
    assert found["top"] == [0, 1, 2, 3] and found["bottom"] == [4, 5, 6, 7]
    assert len(set(found["random"])) == 4


def test_training_ends_in_a_plain_model_and_changes_no_source():
    base = CNN(norm=True)
    sources = [tuned(base, s) for s in (1, 2)]
    before = [digest(m) for m in (base, *sources)]
    options = {"epochs": 3, "batch_size": 12, "lr": 0.1}
    result = transfer(AXIS(0.5, 0.5), sources, base, (INPUTS, LABELS), test=(INPUTS, LABELS), **options)
    assert type(result.model) is CNN and [digest(m) for m in (base, *sources)] == before
    titles = [panel.title for panel in result.report.panels]
    assert titles[0].startswith("Singular values") and titles[1].startswith("Spectral norm")
    merged = AXIS(0.5, 0.5)
    run = ready(merged, sources, base)
    assert not torch.allclose(result.model.layer2.weight, merged.deploy(run["target"]).layer2.weight, atol=1e-3)
    rest = Factors.of((result.model.layer2.weight - base.layer2.weight).flatten(1))
    assert (rest.s > 1e-4).sum() <= 4  # it stays within the merge's directions


# What is refused


def test_arguments_and_sources_that_cannot_be_used():
    for wrong in ({"rank": 0.0}, {"tuned": 1.5}, {"merge": "mean"}, {"order": "best"}, {"head_lr_scale": 0.0}):
        with pytest.raises(InputError, match="AXIS"):
            AXIS(**wrong)
    broken = copy.deepcopy(CNN(norm=True))
    broken.layer2.weight.data[0] = torch.inf
    with pytest.raises(InputError, match="'layer2.weight' holds numbers that are not finite"):
        ready(AXIS(), [broken])
    run = Run({"target": CNN(), "source.0": CNN(seed=1)}, {"data": as_data(INPUTS)})
    with pytest.raises(InputError, match="learns from the labels"):
        AXIS().setup(run, Batch(inputs=INPUTS))
    with pytest.raises(InputError, match="source="):
        ready(AXIS(), [])

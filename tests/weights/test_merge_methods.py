"""Merge methods against hand-computed cases, limits, loops, and mergekit where it is installed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transfuse.core.errors import InputError
from transfuse.weights import (
    DARE,
    DELLA,
    SCE,
    SLERP,
    TIES,
    TSVM,
    Breadcrumbs,
    IsoC,
    Karcher,
    Linear,
    Merge,
    ModelStock,
    MultiSLERP,
    NearSwap,
    NuSLERP,
    Passthrough,
    TaskArithmetic,
)
from transfuse.weights.sparsify import SMALL, keep_by_rank, keep_largest, keep_middle, keep_random, least_kept

KEY = "layers.0.w"
ALL: list[tuple[Merge, int]] = [
    (Linear(), 3), (SLERP(), 2), (NuSLERP(), 2), (MultiSLERP(), 3), (Karcher(), 3), (TaskArithmetic(1 / 3), 3),
    (TIES(), 3), (TIES(0.5, normalize=False), 3), (DARE(), 3), (DARE(consensus=True), 3), (DELLA(), 3),
    (DELLA(consensus=False), 3), (Breadcrumbs(), 3), (Breadcrumbs(consensus=True), 3), (SCE(), 3), (SCE(0.5), 3),
    (ModelStock(), 3), (ModelStock(rows=True), 3), (NearSwap(0.01), 1), (Passthrough(), 1), (TSVM(), 3), (IsoC(), 3),
]  # fmt: skip


SYMMETRIC = [(m, c) for m, c in ALL if c == 3 and not isinstance(m, DARE | DELLA)]


def draws(*shape: int, count: int = 3, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A base and models near it."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=draw)
    return base, [base + 0.3 * torch.randn(shape, generator=draw) for _ in range(count)]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


# What every merge does


@pytest.mark.parametrize(("method", "count"), ALL, ids=repr)
@pytest.mark.parametrize("shape", [(12,), (6, 8), (4, 3, 2, 2)], ids=str)
def test_shapes_types_and_inputs_stay_as_they_are(method, count, shape):
    base, models = draws(*shape, count=count)
    before = [base.clone(), *(model.clone() for model in models)]
    merged = method.merge(KEY, base, models)
    assert merged.shape == base.shape and merged.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(before, [base, *models], strict=True))
    assert torch.equal(merged, method.merge(KEY, base, models))


@pytest.mark.parametrize(("method", "count"), ALL, ids=repr)
def test_models_that_learned_nothing_give_the_ancestor(method, count):
    base, _ = draws(6, 8)
    assert torch.allclose(method.merge(KEY, base, [base.clone() for _ in range(count)]), base, atol=1e-6)
    zeros = torch.zeros(4, 4)
    assert torch.equal(method.merge(KEY, zeros, [zeros.clone() for _ in range(count)]), zeros)


@pytest.mark.parametrize(
    ("method", "count"), [(m, c) for m, c in ALL if c == 3 and type(m) not in (DARE, DELLA)], ids=repr
)
def test_the_order_of_models_does_not_matter(method, count):
    base, models = draws(6, 8)
    assert torch.allclose(method.merge(KEY, base, models), method.merge(KEY, base, models[::-1]), atol=1e-5)


@pytest.mark.parametrize("method", [m for m, _ in ALL if m.needs_base], ids=repr)
def test_half_precision_models_merge_as_their_full_copies(method):
    base, models = draws(6, 8, count=method.exactly or 3)
    halves = [model.bfloat16() for model in models]
    full = method.merge(KEY, base, [half.float() for half in halves])
    assert torch.equal(method.merge(KEY, base, halves), full)


# Averages and arithmetic


def test_linear_by_hand():
    models = [vector(1, 2), vector(3, 6)]
    assert Linear([3, 1]).merge(KEY, None, models).tolist() == [1.5, 3.0]
    assert Linear([3, 1], normalize=False).merge(KEY, None, models).tolist() == [6.0, 12.0]
    with pytest.raises(InputError, match="sum to 0"):
        Linear([1, -1]).merge(KEY, None, models)
    with pytest.raises(InputError, match="finite"):
        Linear([1, math.nan]).merge(KEY, None, models)


def test_task_arithmetic_adds_and_takes_away():
    base, models = vector(1, 1), [vector(2, 1), vector(1, 3)]
    assert TaskArithmetic().merge(KEY, base, models).tolist() == [2.0, 3.0]
    assert TaskArithmetic([1, -0.5]).merge(KEY, base, models).tolist() == [2.0, 0.0]
    assert TaskArithmetic(scale=0.5).merge(KEY, base, models).tolist() == [1.5, 2.0]
    base, models = draws(5, 7)
    average = TaskArithmetic(normalize=True).merge(KEY, base, models)
    assert torch.allclose(average, Linear().merge(KEY, None, models), atol=1e-6)


def test_passthrough_scales_and_nearswap_moves_by_at_most_t():
    base, far = vector(0, 0, 0), vector(0.005, -0.5, 3)
    assert Passthrough(2.0).merge(KEY, None, [far]).tolist() == pytest.approx([0.01, -1.0, 6.0])
    assert NearSwap(0.01).merge(KEY, base, [far]).tolist() == pytest.approx([0.005, -0.01, 0.01])
    with pytest.raises(InputError, match="t is 0"):
        NearSwap(0)


# Spheres


def test_slerp_at_its_ends_on_a_right_angle_and_on_a_line():
    a, b = vector(1, 0), vector(0, 2)
    assert torch.allclose(SLERP(0.0).merge(KEY, None, [a, b]), a)
    assert torch.allclose(SLERP(1.0).merge(KEY, None, [a, b]), b, atol=1e-6)
    half = math.sqrt(0.5)
    assert SLERP(0.5).merge(KEY, None, [a, b]).tolist() == pytest.approx([half, 2 * half])
    assert SLERP(0.25).merge(KEY, None, [vector(1, 0), vector(3, 0)]).tolist() == [1.5, 0.0]
    assert SLERP(0.25).merge(KEY, None, [vector(1, 0), vector(-1, 0)]).tolist() == [0.5, 0.0]


def test_slerp_keeps_the_length_of_models_of_one_length():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(50, generator=draw), dim=0) for _ in range(2))
    for t in (0.1, 0.5, 0.9):
        assert SLERP(t).merge(KEY, None, [a, b]).norm().item() == pytest.approx(1.0, abs=1e-5)


def test_nuslerp_weighs_models_and_can_turn_every_row_by_its_own_angle():
    _, models = draws(4, 5, count=2)
    assert torch.allclose(NuSLERP([1, 3]).merge(KEY, None, models), SLERP(0.75).merge(KEY, None, models), atol=1e-6)
    rows = NuSLERP([1, 3], along="rows").merge(KEY, None, models)
    columns = NuSLERP([1, 3], along="columns").merge(KEY, None, models)
    for i in range(4):
        one = SLERP(0.75).merge(KEY, None, [m[i] for m in models])
        assert torch.allclose(rows[i], one, atol=1e-5)
        other = SLERP(0.75).merge(KEY, None, [m[:, i] for m in models])
        assert torch.allclose(columns[:, i], other, atol=1e-5)
    base, models = draws(4, 5, count=2)
    learned = [model - base for model in models]
    expected = base + NuSLERP().merge(KEY, None, learned)
    assert torch.allclose(NuSLERP().merge(KEY, base, models), expected, atol=1e-6)


def test_means_on_the_sphere_lie_in_the_middle():
    a, b = vector(1, 0), vector(0, 1)
    half = [math.sqrt(0.5)] * 2
    for method in (Karcher(), MultiSLERP()):
        assert method.merge(KEY, None, [a, b]).tolist() == pytest.approx(half, abs=1e-6)
        assert method.merge(KEY, None, [2 * a, 4 * b]).tolist() == pytest.approx([3 * x for x in half], abs=1e-5)
    assert torch.allclose(MultiSLERP([1, 0]).merge(KEY, None, [a, b]), a, atol=1e-5)
    with pytest.raises(InputError, match="cancel"):
        MultiSLERP().merge(KEY, None, [vector(1, 0), vector(-0.5, math.sqrt(0.75)), vector(-0.5, -math.sqrt(0.75))])


def test_karcher_ends_where_angles_balance():
    _, models = draws(30)
    units = [model / model.norm() for model in models]
    mean = Karcher(steps=50, tolerance=1e-7).merge(KEY, None, models).double()
    mean /= mean.norm()
    tangent = torch.zeros_like(mean)
    for unit in units:
        cosine = (mean @ unit.double()).clamp(-1, 1)
        tangent += (unit.double() - cosine * mean) * cosine.arccos() / cosine.arccos().sin()
    assert tangent.norm() < 1e-5


# What survives


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=30),
    st.floats(0, 1),
    st.floats(0, 0.5),
)
def test_the_largest_and_the_middle_survive_and_ties_by_their_place(values, density, outliers):
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    kept = max(1, int(density * len(values))) if density > 0 else 0
    wanted = [v if i in order[:kept] else 0.0 for i, v in enumerate(values)]
    assert keep_largest(torch.tensor(values), density).tolist() == wanted
    if density < 1:
        top = min(int(outliers * len(values)), len(values) - kept)
        wanted = [v if i in order[top : top + kept] else 0.0 for i, v in enumerate(values)]
        assert keep_middle(torch.tensor(values), density, outliers).tolist() == wanted


@pytest.mark.parametrize("kind", ["normal", "equal", "sorted", "few values", "heavy"])
def test_a_sample_finds_the_threshold_of_many_exactly(kind):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2 * SMALL + 77, generator=draw).abs()
    x = {
        "normal": x, "equal": torch.ones_like(x), "sorted": x.sort().values, "few values": (3 * x).round(),
        "heavy": x.pow(9),
    }[kind]  # fmt: skip
    ordered = x.sort(descending=True).values
    for k in (1, 2, 100, len(x) // 5, len(x) // 2, len(x) - 3, len(x)):
        assert least_kept(x.clone(), k) == ordered[k - 1]
    assert int(keep_largest(x + 1, 0.3).count_nonzero()) == int(0.3 * len(x))


def test_what_is_dropped_at_random_leaves_the_mean():
    x = torch.arange(1.0, 9.0).repeat(4000, 1)
    draw = torch.Generator().manual_seed(0)
    kept = keep_random(x.clone(), 0.25, draw)
    assert torch.allclose(kept.mean(0), x[0], rtol=0.1)
    assert (kept != 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    ranked = keep_by_rank(x.clone(), 0.5, 0.2, draw)
    assert torch.allclose(ranked.mean(0), x[0], rtol=0.1)
    assert (ranked != 0).float().mean(0).tolist() == pytest.approx([0.3 + 0.4 * i / 7 for i in range(8)], abs=0.03)
    assert torch.equal(keep_random(x.clone(), 1.0, draw), x)


def test_ties_by_hand():
    base = torch.zeros(4)
    models = [vector(3, -2, 1, 0.1), vector(1, 4, -1, 0.2), vector(-1, 1, 5, 0.3)]
    # Two of four survive: (3, -2, 0, 0), (1, 4, 0, 0), (-1, 0, 5, 0), where the first of equal magnitudes wins.
    merged = TIES(density=0.5).merge(KEY, base, models)
    assert merged.tolist() == [2.0, 4.0, 5.0, 0.0]
    assert TIES(density=0.5, normalize=False).merge(KEY, base, models).tolist() == [4.0, 4.0, 5.0, 0.0]
    assert TIES(density=0.5, scale=0.5).merge(KEY, base, models).tolist() == [1.0, 2.0, 2.5, 0.0]
    weighted = TIES(density=0.5, weight=[1, 1, 5]).merge(KEY, base, models)
    assert weighted.tolist() == [-1.0, 4.0, 5.0, 0.0]  # the heavy model's sign is elected
    dense = TIES(density=[1.0, 0.0, 0.0]).merge(KEY, base, models)
    assert torch.equal(dense, models[0])


def reference_ties(base: Tensor, models: Sequence[Tensor], density: float, weights: Sequence[float]) -> Tensor:
    """As a loop over entries in float64."""
    deltas = [(model.double() - base.double()).flatten().tolist() for model in models]
    for delta in deltas:
        order = sorted(range(len(delta)), key=lambda i: (-abs(delta[i]), i))
        for i in order[max(1, int(density * len(delta))) :]:
            delta[i] = 0.0
    merged = []
    for i, start in enumerate(base.double().flatten().tolist()):
        column = [w * d[i] for w, d in zip(weights, deltas, strict=True)]
        sign = 1 if sum(column) >= 0 else -1
        chosen = [(c, w) for c, w in zip(column, weights, strict=True) if c * sign > 0]
        merged.append(start + (sum(c for c, _ in chosen) / sum(w for _, w in chosen) if chosen else 0.0))
    return torch.tensor(merged, dtype=torch.float64).view(base.shape)


def test_ties_is_the_loop_over_entries_in_pieces_too(monkeypatch):
    base, models = draws(9, 11)
    weights = [1.0, 0.5, 2.0]
    expected = reference_ties(base, models, 0.4, weights)
    for piece in (7, 10**6):
        monkeypatch.setattr("transfuse.weights.deltas.PIECE", piece)
        assert torch.allclose(TIES(0.4, weights).merge(KEY, base, models).double(), expected, atol=1e-6)


def test_what_dare_and_della_drop_follows_from_seed_and_name():
    base, models = draws(20, 20)
    for kind in (DARE, DELLA):
        one = kind().merge("a", base, models)
        assert torch.equal(one, kind().merge("a", base, models))
        assert not torch.equal(one, kind().merge("b", base, models))
        assert not torch.equal(one, kind(seed=1).merge("a", base, models))
    full = TaskArithmetic().merge("a", base, models)
    assert torch.allclose(DARE(1.0).merge("a", base, models), full, atol=1e-6)
    assert torch.allclose(DELLA(1.0, consensus=False, normalize=False).merge("a", base, models), full, atol=1e-6)
    assert torch.allclose(Breadcrumbs(1.0).merge("a", base, models), full, atol=1e-6)
    with pytest.raises(InputError, match=r"from -0.05 to 0.25"):
        DELLA(0.1, 0.15).merge("a", base, models)


def test_sce_by_hand():
    base, models = torch.zeros(2), [vector(1, 1), vector(3, -1)]
    # mean squares 1 and 5: weights 1/6 and 5/6; the sum of the second entry is 0, so plus is elected.
    merged = SCE().merge(KEY, base, models)
    assert merged.tolist() == pytest.approx([(1 + 15) / 6, 1.0])
    same = [vector(1, 2), vector(1, 4)]
    assert SCE(0.9).merge(KEY, base, same).tolist() == [0.0, 0.0]  # one entry varies, and 0.9 of it is none
    assert SCE(1.0).merge(KEY, base, same)[0] == pytest.approx(1.0)


def test_model_stock_goes_as_far_as_models_agree():
    base = torch.zeros(2)
    assert ModelStock().merge(KEY, base, [vector(1, 0), vector(1, 0)]).tolist() == [1.0, 0.0]
    assert ModelStock().merge(KEY, base, [vector(1, 0), vector(0, 1)]).tolist() == [0.0, 0.0]
    cosine = 1 / math.sqrt(2)
    t = 2 * cosine / (1 + cosine)
    assert ModelStock().merge(KEY, base, [vector(1, 0), vector(1, 1)]).tolist() == pytest.approx([t, t / 2])
    assert ModelStock().merge(KEY, base, [vector(1, 0), vector(-1, 0)]).tolist() == [0.0, 0.0]
    rows = [torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])]
    assert ModelStock(rows=True).merge(KEY, torch.zeros(2, 2), rows).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    with pytest.raises(InputError, match="at least two"):
        ModelStock().merge(KEY, base, [vector(1, 0)])


# Singular vectors


def test_iso_c_keeps_directions_and_equalises_their_weights():
    base, models = draws(6, 4)
    added = IsoC().merge(KEY, base, models) - base
    total = sum(model - base for model in models)
    values = torch.linalg.svdvals(total)
    assert torch.allclose(torch.linalg.svdvals(added), values.mean().expand(4), atol=1e-4)
    vectors = draws(5)
    average = Linear().merge(KEY, None, vectors[1])
    assert torch.allclose(IsoC().merge(KEY, *vectors), average, atol=1e-6)


def test_tsv_m_of_one_model_is_that_model_and_orthogonal_tasks_do_not_disturb_each_other():
    base, models = draws(6, 6, count=1)
    assert torch.allclose(TSVM().merge(KEY, base, models), models[0], atol=1e-5)
    orthogonal, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
    parts = [orthogonal[:, i : i + 3] @ torch.diag(vector(3, 2, 1)) @ orthogonal[:, i : i + 3].T for i in (0, 3)]
    merged = TSVM().merge(KEY, torch.zeros(6, 6), parts)
    assert torch.allclose(merged, parts[0] + parts[1], atol=1e-5)


def test_arguments_out_of_range_are_refused():
    for wrong in (
        lambda: TIES(1.5), lambda: DARE(-0.1), lambda: DELLA(0.5, 0.7), lambda: Breadcrumbs(outliers=2),
        lambda: SCE(0), lambda: Karcher(0), lambda: NuSLERP(along="diagonals"),
    ):  # fmt: skip
        with pytest.raises(InputError):
            wrong()
    base, models = draws(4)
    with pytest.raises(InputError, match="TIES: density has 2 numbers, there are 3 models"):
        TIES([0.1, 0.2]).merge(KEY, base, models)


# mergekit


def test_the_formulas_are_those_of_mergekit():
    pytest.importorskip("mergekit")
    from mergekit.merge_methods.karcher import karcher_merge_tensors
    from mergekit.merge_methods.nuslerp import nuslerp
    from mergekit.merge_methods.slerp import slerp
    from mergekit.sparsify import magnitude, magnitude_outliers

    _, (a, b, c) = draws(7, 9)
    for t in (0.0, 0.3, 1.0):
        theirs = slerp(torch.tensor([t]), a[None], b[None])[0]
        assert torch.allclose(SLERP(t).merge(KEY, None, [a, b]), theirs, atol=1e-5)
        for along, named in (("tensor", {"flatten": True}), ("rows", {"dim": -1}), ("columns", {"dim": 0})):
            theirs = nuslerp(t, a, b, **named)
            ours = NuSLERP([1 - t, t], along=along).merge(KEY, None, [a, b])
            assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(
        Karcher().merge(KEY, None, [a, b, c]), karcher_merge_tensors([a, b, c], [1 / 3] * 3), atol=1e-5
    )
    for density in (0.1, 0.33, 0.9):
        assert torch.equal(keep_largest(a.clone(), density), magnitude(a, density))
        theirs = magnitude_outliers(a, density, gamma=0.05)
        assert torch.equal(keep_middle(a.clone(), density, 0.05), theirs)

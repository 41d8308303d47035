"""Fused values and gradients against the dense functions in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from transfuse.losses import Divergence, Projection, Sampled, TopK, label_entropy, match
from transfuse.losses.fused import fused

ROWS, CLASSES, WIDTH = 13, 37, 8
KINDS: list[tuple[Any, float | None]] = [
    ("forward", None),
    ("reverse", None),
    ("skew", 0.1),
    ("skew_reverse", 0.1),
    ("jensen_shannon", 0.5),
    ("jensen_shannon", 0.1),
    ("interpolated", 0.4),
    ("total_variation", None),
]
EVERY = pytest.mark.parametrize(("kind", "share"), KINDS, ids=lambda v: str(v))


def side(seed: int, width: int = WIDTH, bias: bool = False, dtype: torch.dtype = torch.float32) -> Projection:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(ROWS, width), (CLASSES, width), (CLASSES,)]
    tensors = [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]
    return Projection(tensors[0], tensors[1], tensors[2] if bias else None)


def labels() -> Tensor:
    found = torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(7))
    found[::4] = -100
    return found


def some_rows() -> Tensor:
    return torch.arange(ROWS) % 3 != 1


def learning(student: Projection, dtype: torch.dtype | None = None) -> Projection:
    """The same, as a leaf whose gradients are wanted."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().to(dtype or t.dtype).clone().requires_grad_()

    return Projection(*(None if t is None else leaf(t) for t in (student.hidden, student.weight, student.bias)))


def as64(target: Any) -> Any:
    if isinstance(target, Tensor):
        return target.double()
    if isinstance(target, Projection):
        return Projection(target.hidden.double(), target.weight.double(), target.bias and target.bias.double())
    return target


def total(student: Projection, target: Any, divergence: Divergence, **options: Any) -> Tensor:
    """The loss that `match` is told to expect, with a weight that it could not know."""
    a, b = options.get("expect", (1.0, 1.0))
    values, entropy = match(student, target, divergence, **options)
    return 0.37 * (a * values.sum() + (0 if entropy is None else b * entropy.sum()))


def by_hand(student: Projection, target: Any, divergence: Divergence, **options: Any) -> Tensor:
    dense = as64(target)
    logits = student.dense()
    return total(logits, dense.dense() if isinstance(dense, Projection) else dense, divergence, **options)


def gradients(loss: Tensor, student: Projection) -> list[Tensor]:
    leaves = [t for t in (student.hidden, student.weight, student.bias) if t is not None]
    return [g.double() for g in torch.autograd.grad(loss, leaves)]


def assert_agree(student: Projection, target: Any, divergence: Divergence, rel: float = 1e-5, **options: Any) -> None:
    ours, reference = learning(student), learning(student, torch.float64)
    loss, expected = total(ours, target, divergence, **options), by_hand(reference, target, divergence, **options)
    assert loss.item() == pytest.approx(expected.item(), rel=rel)
    for found, wanted in zip(gradients(loss, ours), gradients(expected, reference), strict=True):
        assert (found - wanted).abs().max() <= rel * wanted.abs().max()


@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@EVERY
def test_equal_to_float64_with_labels_rows_and_a_mixture(kind, share, temperature):
    options = {"labels": labels(), "rows": some_rows(), "expect": (0.7, 0.3)}
    assert_agree(side(0, bias=True), side(1, width=5), Divergence(kind, share, temperature), **options)


@pytest.mark.parametrize("chunk", [1, 7, ROWS])
@EVERY
def test_chunks_change_nothing(kind, share, chunk, monkeypatch):
    monkeypatch.setattr("transfuse.losses.fused.BLOCK", 3)
    student, teacher = learning(side(0)), side(1)
    divergence, given = Divergence(kind, share, 2.0), {"labels": labels(), "expect": (0.5, 0.5)}
    reference = learning(side(0), torch.float64)
    values, entropy = fused(student, teacher, divergence, chunk=chunk, **given)
    loss = 0.5 * (values.sum() + entropy.sum())
    wanted = by_hand(reference, teacher, divergence, **given) / 0.37
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for a, b in zip(gradients(loss, student), gradients(wanted, reference), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_a_dense_teacher_and_batches_of_texts():
    student = side(0)
    shaped = Projection(student.hidden[:12].view(3, 4, WIDTH), student.weight)
    teacher = torch.randn(3, 4, CLASSES)
    assert_agree(shaped, teacher, Divergence("forward", temperature=3.0), labels=labels()[:12].view(3, 4))


def sparse(kind: str) -> TopK | Sampled:
    log_p = side(1).dense().log_softmax(-1)
    if kind == "top-k":
        kept = log_p.topk(5)
        return TopK(kept.indices, kept.values, CLASSES)
    if kind == "top-k, one filled up":
        kept = log_p.topk(5)
        values = kept.values.clone()
        values[2, 3:] = -torch.inf
        return TopK(kept.indices, values, CLASSES)
    counts = torch.zeros(ROWS, CLASSES)
    drawn = log_p.exp().multinomial(9, replacement=True, generator=torch.Generator().manual_seed(0))
    counts.scatter_add_(-1, drawn, torch.ones(ROWS, 9))
    counts[4] = 0  # nothing was drawn
    kept = counts.topk(9)
    return Sampled(kept.indices, kept.values.to(torch.uint8), CLASSES)


@pytest.mark.parametrize("kind", ["top-k", "top-k, one filled up", "sampled"])
def test_sparse_targets_are_equal_to_float64(kind):
    options = {"labels": labels(), "rows": some_rows(), "expect": (0.25, 0.75)}
    assert_agree(side(0), sparse(kind), Divergence(), **options)
    if kind == "sampled":
        softened = replace(sparse(kind), temperature=2.0)
        assert_agree(side(0), softened, Divergence(temperature=2.0), **options)


@EVERY
def test_half_precision_stays_close_and_comes_back_as_it_was(kind, share):
    exact = learning(side(0, dtype=torch.bfloat16), torch.float64)
    student, teacher = learning(side(0, dtype=torch.bfloat16)), side(1, dtype=torch.bfloat16)
    loss = total(student, teacher, Divergence(kind, share), labels=labels())
    assert loss.dtype == torch.float32
    wanted = by_hand(exact, teacher, Divergence(kind, share), labels=labels())
    assert loss.item() == pytest.approx(wanted.item(), rel=0.02)
    leaves = [student.hidden, student.weight]
    for g, w in zip(torch.autograd.grad(loss, leaves), gradients(wanted, exact), strict=True):
        assert g.dtype == torch.bfloat16
        assert (g.double() - w).norm() <= 0.03 * w.norm()


@EVERY
def test_zero_where_student_equals_teacher(kind, share):
    student = learning(side(0, bias=True))
    values, _ = match(student, side(0, bias=True), Divergence(kind, share))
    found = gradients(values.sum(), student)
    if kind != "interpolated":  # a cross-entropy: the teacher's entropy is left
        assert values.abs().max() < 1e-6
    assert all(g.abs().max() < 1e-5 for g in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
@EVERY
def test_gradients_are_finite_with_excluded_classes_and_rows(kind, share, temperature, dtype):
    """A padded head: the last classes are -inf on both sides, and one teacher row excludes everything."""
    student, teacher = side(0, bias=True, dtype=dtype), side(1, bias=True, dtype=dtype)
    for one in (student, teacher):
        one.bias[-4:] = -torch.inf
    dense = teacher.dense().clone()
    dense[5] = -torch.inf
    divergence = Divergence(kind, share, temperature)
    for target, rows in ((teacher, None), (dense, torch.arange(ROWS) != 5), (dense, torch.zeros(ROWS).bool())):
        ours = learning(student)
        values, _ = match(ours, target, divergence, rows=rows)
        assert values.isfinite().all()
        assert all(g.isfinite().all() for g in gradients(values.sum(), ours))


@EVERY
def test_excluded_classes_follow_the_dense_functions(kind, share):
    student, teacher = side(0, bias=True), side(1, bias=True).dense()
    student.bias[-4:] = -torch.inf
    teacher[:, -4:] = -torch.inf
    ours, reference = learning(student), learning(student, torch.float64)
    values, _ = match(ours, teacher, Divergence(kind, share))
    wanted, _ = match(reference.dense(), teacher.double(), Divergence(kind, share))
    assert torch.allclose(values.double(), wanted, rtol=1e-5, atol=1e-6)
    hidden, weight = (gradients(v.sum(), o)[:2] for v, o in ((values, ours), (wanted, reference)))
    for a, b in zip(hidden, weight, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_gradients_that_were_not_expected_are_exact():
    student, reference = learning(side(0)), learning(side(0), torch.float64)
    own = torch.rand(ROWS, dtype=torch.float64)

    def loss(of: Any, target: Any, dtype: torch.dtype) -> Tensor:
        values, entropy = match(of, target, Divergence("reverse"), labels=labels(), expect=(1.0, 0.0))
        return (own.to(dtype) * values).sum() + entropy[3] * 2

    found = loss(student, side(1), torch.float32)
    wanted = loss(reference.dense(), as64(side(1)).dense(), torch.float64)
    for a, b in zip(gradients(found, student), gradients(wanted, reference), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_expected_gradients_are_formed_once_and_others_anew(monkeypatch):
    from transfuse.losses.fused import _Work

    runs = []
    run = _Work.run
    monkeypatch.setattr(_Work, "run", lambda self, *a: (runs.append(1), run(self, *a))[1])
    student = learning(side(0))
    values, entropy = match(student, side(1), Divergence(), labels=labels(), expect=(0.3, 0.7))
    leaves = [student.hidden, student.weight]
    loss = (0.3 / 13) * values.sum() + (0.7 / 13) * entropy.sum()
    torch.autograd.grad(values.sum(), leaves, retain_graph=True)  # a term's own norm
    assert len(runs) == 2
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert len(runs) == 2
    again = torch.autograd.grad(2 * loss, leaves)
    assert len(runs) == 3
    for a, b in zip(first, again, strict=True):
        assert torch.allclose(2 * a, b, rtol=1e-5, atol=1e-7)


def test_a_frozen_output_layer_gets_no_gradient_and_without_a_graph_none_is_formed():
    student = side(0)
    hidden = student.hidden.clone().requires_grad_()
    values, _ = match(Projection(hidden, student.weight), side(1), Divergence())
    values.sum().backward()
    assert hidden.grad.abs().max() > 0
    assert student.weight.grad is None
    with torch.no_grad():
        values, _ = match(learning(side(0)), side(1), Divergence())
    assert not values.requires_grad
    assert not match(side(0), side(1), Divergence())[0].requires_grad


def test_a_teacher_that_learns_gets_its_gradient():
    student, teacher = learning(side(0)), learning(side(1))
    values, _ = match(student, teacher, Divergence())
    values.sum().backward()
    assert teacher.weight.grad.abs().max() > 0


def test_one_weight_for_reading_and_writing_gets_both_gradients():
    weight = side(0).weight.requires_grad_()
    tokens = torch.arange(ROWS)
    tied = match(Projection(weight[tokens], weight), side(1), Divergence())[0].sum()
    dense = Divergence()(weight[tokens] @ weight.T, side(1).dense()).sum()
    (a,), (b,) = torch.autograd.grad(tied, weight), torch.autograd.grad(dense, weight)
    assert torch.allclose(a, b, atol=1e-5)


def test_labels_alone():
    student, reference = learning(side(0, bias=True)), learning(side(0, bias=True), torch.float64)
    found, wanted = label_entropy(student, labels()), label_entropy(reference.dense(), labels())
    assert torch.allclose(found.double(), wanted, rtol=1e-5)
    for a, b in zip(gradients(found.sum(), student), gradients(wanted.sum(), reference), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_wrong_inputs_are_refused():
    student = side(0)
    with pytest.raises(ValueError, match="equal shapes"):
        match(student, torch.randn(ROWS, 5), Divergence())
    with pytest.raises(ValueError, match="labels must lie in 0"):
        label_entropy(student, torch.full((ROWS,), CLASSES))
    with pytest.raises(ValueError, match="temperature 1.0, asked for 2"):
        match(student, sparse("top-k"), Divergence(temperature=2.0))
    with pytest.raises(ValueError, match="whole distribution"):
        match(student, sparse("sampled"), Divergence("reverse"))
    for wrong in ({"kind": "jsd"}, {"kind": "skew"}, {"share": 0.5}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=r"share|unknown divergence|temperature"):
            Divergence(**wrong)
    for end in (0.0, 1.0):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            Divergence("jensen_shannon", end)

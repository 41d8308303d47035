"""Four properties of every distillation method, generated from the public names of the family.

That a loss does not depend on how a batch is cut is in `tests/core/test_splitting.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from helpers import images, language_model, make, ragged_tokens, trainer
from torch import Tensor, nn

from transfuse.core.batch import Batch, align_tokens
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, ShapeError
from transfuse.core.outputs import Outputs
from transfuse.core.run import Run
from transfuse.core.streams import as_data
from transfuse.distill import CATKD, KD, RKD, TAID, AttentionTransfer, Distillation, Hints, Labels, TopKD, WCoRD
from transfuse.losses import Term

ALL = [*helpers.METHODS, TopKD]
METHODS = [cls for cls in ALL if "classification" in cls.card.tasks]
SOURCED = [cls for cls in METHODS if cls.uses_source]
TEXTUAL = [cls for cls in ALL if "language-model" in cls.card.tasks]
TAUGHT_TEXT = [cls for cls in TEXTUAL if cls.uses_source]
NEVER_ZERO = {  # what is scaled up, or told apart from others, is not reached by the teacher itself
    TopKD,
    WCoRD,
    *helpers.declared("NOT_ZERO"),
}
SOFT = {TAID}
"""Cross-entropies to a soft target: where student equals teacher they are its entropy, with a gradient of zero."""
CLASSES = 8


class CNN(helpers.CNN):
    """With as many classes as TopKD's groups need."""

    def __init__(self, width: int = 4, seed: int = 0):
        super().__init__(width, seed=seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed + 100)
            self.fc = nn.Linear(2 * width, CLASSES)


def batch(count: int = 12) -> Batch:
    return Batch(helpers.batch(count), index=torch.arange(count))


def outputs(
    method: Distillation, student: nn.Module, teacher: nn.Module, one: Batch, task: str = "classification"
) -> tuple[Outputs, Outputs]:
    """What the two models give, after the method has been set up on them."""
    run = Run({"target": student, "source": teacher}, {"data": as_data(one)}, task=task)
    run.install(method.wants())
    run.set_modes(set())
    method.setup(run, one)
    found = run("target", one), run("source", one, grad=False)
    run.remove_taps()
    return found


def terms(
    method: Distillation, student: nn.Module, teacher: nn.Module, one: Batch, task: str = "classification"
) -> dict[str, Term]:
    return method.loss(*outputs(method, student, teacher, one, task), one, Clock())


def text_terms(method: Distillation, student: nn.Module, teacher: nn.Module, columns: int = 0) -> dict[str, Term]:
    return terms(method, student, teacher, text(columns), "language-model")


def objective(found: dict[str, Term]) -> Tensor:
    return sum(term.weight * term.mean for term in found.values())


def text(columns: int = 0) -> Batch:
    padded = {k: nn.functional.pad(v, (0, columns)) for k, v in ragged_tokens().items()}
    return align_tokens(Batch(inputs=padded))


def taught(found: dict[str, Term]) -> dict[str, Term]:
    """The terms that come from the teacher."""
    return {name: term for name, term in found.items() if name != "labels"}


# Zero where student equals teacher


@pytest.mark.parametrize("cls", [c for c in SOURCED if c not in NEVER_ZERO | SOFT], ids=lambda c: c.__name__)
def test_is_zero_when_student_equals_teacher_and_not_otherwise(cls):
    student = CNN()
    for name, term in taught(terms(make(cls), student, copy.deepcopy(student), batch())).items():
        assert term.mean.item() == pytest.approx(0.0, abs=1e-6), name
    for name, term in taught(terms(make(cls), student, CNN(seed=1), batch())).items():
        assert term.mean.item() > 1e-6, name


@pytest.mark.parametrize("cls", sorted(SOFT, key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_a_soft_target_teaches_nothing_when_student_equals_teacher(cls):
    student = CNN()
    found = taught(terms(make(cls), student, copy.deepcopy(student), batch()))
    gradients = torch.autograd.grad(objective(found), student.parameters(), allow_unused=True)
    assert all(g is None or g.abs().max() < 1e-6 for g in gradients)


@pytest.mark.parametrize("cls", [c for c in TAUGHT_TEXT if c not in SOFT | NEVER_ZERO], ids=lambda c: c.__name__)
def test_is_zero_on_text_when_student_equals_teacher_and_not_when_one_is_shifted(cls):
    class Shifted(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.model(input_ids.roll(1, 1), attention_mask)

    model = language_model()
    same = taught(text_terms(make(cls, "blocks.0"), model, copy.deepcopy(model)))
    shifted = Shifted(copy.deepcopy(model))
    off = taught(text_terms(make(cls, "blocks.0"), model, shifted))
    for name in same:
        assert same[name].mean.item() == pytest.approx(0.0, abs=1e-6)
        assert off[name].mean.item() > 1e-3


# Padding


@pytest.mark.parametrize("columns", [1, 6])
@pytest.mark.parametrize("cls", TEXTUAL, ids=lambda c: c.__name__)
def test_padding_changes_nothing(cls, columns):
    def found(extra: int) -> tuple[dict[str, Term], Tensor]:
        torch.manual_seed(0)  # of the projector
        student = language_model()
        values = text_terms(make(cls, "blocks.0"), student, language_model(1, dim=12), extra)
        objective(values).backward()
        return values, student.blocks[0].attn.qkv.weight.grad

    (plain, gradient), (padded, other) = found(0), found(columns)
    for name, term in plain.items():
        assert padded[name].sum.item() == pytest.approx(term.sum.item(), rel=1e-5)
        assert float(padded[name].count) == float(term.count)
    assert gradient.abs().max() > 0
    assert torch.allclose(gradient, other, atol=1e-6)


# Agreement with a loop in float64, written from the formula


def softmax(row: np.ndarray) -> list[float]:
    exponentials = [math.exp(x - max(row)) for x in row]
    return [e / sum(exponentials) for e in exponentials]


def kd(method: KD, s: np.ndarray, t: np.ndarray, labels: list[int], *_: Any) -> float:
    divergence = 0.0
    for student, teacher in zip(s, t, strict=True):
        p, q = softmax(teacher / method.temperature), softmax(student / method.temperature)
        divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    distilled = method.temperature**2 * divergence / len(s)
    return method.alpha * distilled + (1 - method.alpha) * cross_entropy(method, s, t, labels)


def cross_entropy(_method: Any, s: np.ndarray, _t: np.ndarray, labels: list[int], *_: Any) -> float:
    known = [(row, label) for row, label in zip(s, labels, strict=True) if label != -100]
    return sum(-math.log(softmax(row)[label]) for row, label in known) / len(known)


def taid(method: TAID, s: np.ndarray, t: np.ndarray, *_: Any) -> float:
    total = 0.0
    for student, teacher in zip(s, t, strict=True):
        target = softmax((1 - method.start) * student + method.start * teacher)
        total -= sum(p * math.log(q) for p, q in zip(target, softmax(student), strict=True))
    return total / len(s)


def hints(method: Hints, _s: Any, _t: Any, _y: Any, ours: np.ndarray, theirs: np.ndarray) -> float:
    weight = method.projector.width.weight.detach().double().numpy()[:, :, 0, 0]
    total = 0.0
    for sample, target in zip(ours, theirs, strict=True):
        values = [
            (sum(weight[o, c] * sample[c, i, j] for c in range(len(sample))) - target[o, i, j]) ** 2
            for o in range(target.shape[0])
            for i in range(target.shape[1])
            for j in range(target.shape[2])
        ]
        total += sum(values) / len(values)
    return total / len(ours)


def attention(method: AttentionTransfer, _s: Any, _t: Any, _y: Any, ours: np.ndarray, theirs: np.ndarray) -> float:
    def normalised(feature: np.ndarray) -> np.ndarray:
        maps = np.array([[sum(c[i, j] ** 2 for c in feature) for j in range(2)] for i in range(2)])
        return maps / math.sqrt((maps**2).sum())

    distances = [math.sqrt(((normalised(a) - normalised(b)) ** 2).sum()) for a, b in zip(ours, theirs, strict=True)]
    return method.beta / (2 * 4) * sum(distances) / len(distances)


def rkd(method: RKD, _s: Any, _t: Any, _y: Any, ours: np.ndarray, theirs: np.ndarray) -> float:
    def huber(x: float) -> float:
        return x * x / 2 if abs(x) < 1 else abs(x) - 0.5

    n = len(ours)

    def distances(rows: np.ndarray) -> np.ndarray:
        table = np.array([[math.sqrt(((a - b) ** 2).sum()) for b in rows] for a in rows])
        return table / (table.sum() / (n * (n - 1)))

    def angle(rows: np.ndarray, i: int, j: int, k: int) -> float:
        one, other = rows[i] - rows[j], rows[k] - rows[j]
        lengths = math.sqrt((one**2).sum()) * math.sqrt((other**2).sum())
        return float(one @ other) / lengths if lengths else 0.0

    d, e = distances(ours), distances(theirs)
    far = sum(huber(d[i, j] - e[i, j]) for i in range(n) for j in range(n)) / n**2
    triplets = [(i, j, k) for i in range(n) for j in range(n) for k in range(n)]
    turn = sum(huber(angle(ours, *t) - angle(theirs, *t)) for t in triplets) / n**3
    return method.distance * far + method.angle * turn


def catkd(
    method: CATKD, s: np.ndarray, t: np.ndarray, labels: list[int], ours: np.ndarray, theirs: np.ndarray
) -> float:
    assert ours.shape == theirs.shape == (7, CLASSES, 2, 2)  # the size to pool to, so nothing is averaged
    squares = [(a - b) ** 2 for a, b in zip(ours.flatten().tolist(), theirs.flatten().tolist(), strict=True)]
    return method.labels * cross_entropy(method, s, t, labels) + method.beta * sum(squares) / len(squares)


def cosine(a: Any, b: Any) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def topkd(method: TopKD, s: np.ndarray, t: np.ndarray, labels: list[int], *_: Any) -> float:
    k, scaled, groups = method.k, [], 0.0
    for student, teacher, label in zip(s, t, labels, strict=True):
        order = sorted(range(CLASSES), key=lambda i: -teacher[i])
        gap = sum(teacher[i] for i in order[:k]) / k - sum(teacher[i] for i in order[k:]) / (CLASSES - k)
        weights = {i: 1 + method.growth * (k - rank) / k for rank, i in enumerate(order[:k])}
        if label not in (-100, order[0]):
            weights[label] = (1 + method.growth) * method.correction
        row = [
            (z * weights[i] if z > 0 else z / weights[i]) + method.shift * gap if i in weights else z
            for i, z in enumerate(teacher)
        ]
        order = sorted(range(CLASSES), key=lambda i: -row[i])
        parts = [cosine(student[g], [row[i] for i in g]) for g in (order[:k], order[-k:], order[k:-k])]
        groups += (1 - method.alpha * parts[0] - method.beta * parts[1] - parts[2]) / len(s)
        scaled.append(row)
    table = np.array([[cosine(a, b) / method.temperature for b in scaled] for a in s])
    contrast = sum(-math.log(softmax(x[i])[i]) / len(s) / 2 for x in (table, table.T) for i in range(len(s)))
    return cross_entropy(method, s, t, labels) + contrast + method.decoupled * groups


def wcord(
    method: WCoRD, s: np.ndarray, t: np.ndarray, labels: list[int], ours: np.ndarray, theirs: np.ndarray
) -> float:
    def embedded(side: Any, rows: np.ndarray) -> np.ndarray:
        weight, bias = (p.detach().double().numpy() for p in (side.linear.weight, side.linear.bias))
        values = np.array([weight @ row + bias for row in rows])
        return np.array([v / math.hypot(*v) for v in values])

    ours, theirs = embedded(method.ours, ours), embedded(method.theirs, theirs)
    torch.manual_seed(0)
    n, k = len(s), len(s) - 1
    others = method.others.draw(torch.arange(n), k).tolist()
    contrast = 0.0
    for anchors, side in ((ours, method.theirs), (theirs, method.ours)):
        bank = side.memory["rows"].double().numpy()
        for i in range(n):
            score = [math.exp(f / method.temperature) for f in (ours[i] @ theirs[i], *(bank[others[i]] @ anchors[i]))]
            score = [f / math.exp(side.log_scale) for f in score]
            chance = [f / (f + k / n) for f in score]
            contrast -= (math.log(chance[0]) + sum(math.log(1 - q) for q in chance[1:])) / n
    cost, plan, sigma = 1 - theirs @ ours.T, np.ones((n, n)), np.ones(n) / n
    for _ in range(50):
        q = np.exp(-cost / 0.5) * plan
        delta = 1 / (n * (q @ sigma))
        sigma = 1 / (n * (q.T @ delta))
        plan = delta[:, None] * q * sigma
    known = cross_entropy(method, s, t, labels)
    return method.labels * known + method.global_weight * contrast + method.local_weight * float((plan * cost).sum())


FORMULAS: dict[type[Distillation], Callable[..., float]] = {
    CATKD: catkd,
    TopKD: topkd,
    WCoRD: wcord,
    KD: kd,
    Labels: cross_entropy,
    Hints: hints,
    AttentionTransfer: attention,
    RKD: rkd,
    TAID: taid,
    **helpers.declared("FORMULAS"),
}


def test_every_method_has_a_formula():
    assert set(FORMULAS) == set(ALL)


@pytest.mark.parametrize("cls", [c for c in TEXTUAL if c not in METHODS], ids=lambda c: c.__name__)
def test_agrees_on_text_with_a_loop_written_from_the_formula(cls):
    method, one = make(cls), text()
    student, teacher = outputs(method, language_model(), language_model(1, dim=12), one, "language-model")
    torch.manual_seed(0)  # of what is drawn in the loss
    value = objective(method.loss(student, teacher, one, Clock())).item()
    s, t = (o.logits[one.mask].detach().double().numpy() for o in (student, teacher))
    assert value == pytest.approx(FORMULAS[cls](method, s, t, one.labels[one.mask].tolist()), rel=1e-4)


@pytest.mark.parametrize("cls", METHODS, ids=lambda c: c.__name__)
def test_agrees_with_a_loop_written_from_the_formula(cls):
    method, one = make(cls), batch(7)
    student, teacher = outputs(method, CNN(), CNN(width=6, seed=1), one)
    torch.manual_seed(0)  # of what is drawn in the loss
    value = objective(method.loss(student, teacher, one, Clock())).item()
    features = [next(iter(o.features.values())).detach().double().numpy() for o in (student, teacher) if o.features]
    s, t = (o.logits.detach().double().numpy() for o in (student, teacher))
    assert value == pytest.approx(FORMULAS[cls](method, s, t, one.labels.tolist(), *features), rel=1e-4)


# Gradients


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3], ids=["weak", "usual", "extreme"])
@pytest.mark.parametrize("cls", METHODS, ids=lambda c: c.__name__)
def test_gradients_are_finite_and_not_zero(cls, scale):
    student, teacher = CNN(), CNN(width=6, seed=1)
    with torch.no_grad():
        for p in (*student.parameters(), *teacher.parameters()):
            p.mul_(scale)
    objective(terms(make(cls), student, teacher, batch())).backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)
    if scale == 1.0:
        assert all(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2], ids=["weak", "usual", "extreme"])
@pytest.mark.parametrize("cls", TAUGHT_TEXT, ids=lambda c: c.__name__)
def test_gradients_on_text_are_finite_not_zero_and_follow_the_teacher(cls, scale):
    def gradients(seed: int) -> list[Tensor]:
        torch.manual_seed(0)
        student, teacher = language_model(), language_model(seed, dim=12)
        with torch.no_grad():
            for p in (*student.parameters(), *teacher.parameters()):
                p.mul_(scale)
        method = make(cls, "blocks.0")
        objective(taught(text_terms(method, student, teacher))).backward()
        return [p.grad for p in student.parameters() if p.grad is not None]

    first = gradients(1)
    assert all(g.isfinite().all() for g in first)
    if scale == 1.0:
        assert all(g.abs().max() > 0 for g in first)
        assert not all(torch.allclose(a, b, rtol=1e-2) for a, b in zip(first, gradients(2), strict=True))


@pytest.mark.parametrize("cls", SOURCED, ids=lambda c: c.__name__)
def test_gradients_are_finite_where_student_equals_teacher(cls):
    student = CNN()
    objective(terms(make(cls), student, copy.deepcopy(student), batch())).backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("cls", SOURCED, ids=lambda c: c.__name__)
def test_teaches_something_else_when_the_teacher_changes(cls):
    """Step 1 of any check against a distillation that is a no-op."""

    def gradient(seed: int) -> Tensor:
        torch.manual_seed(0)
        student = CNN()
        found = taught(terms(make(cls), student, CNN(width=6, seed=seed), batch()))
        return torch.autograd.grad(objective(found), student.layer1.weight)[0]

    assert not torch.allclose(gradient(1), gradient(2), rtol=1e-2)


@pytest.mark.parametrize("cls", [c for c in SOURCED if c.card.data == "unlabelled"], ids=lambda c: c.__name__)
def test_learns_from_the_teacher_without_labels(cls):
    first, last = [], []
    run = trainer(make(cls), CNN(), CNN(width=6, seed=1), images(24)[0], steps=80, optimizer="adam", lr=0.01)
    run.fit()
    for name in run.history[0]["terms"]:
        first.append(run.history[0]["terms"][name]["raw"])
        last.append(run.history[-1]["terms"][name]["raw"])
    assert sum(last) < (1.0 if cls in SOFT else 0.8) * sum(first)


# Single methods


def test_kd_teaches_samples_without_a_label_by_the_teacher_alone():
    one = batch()
    found = terms(KD(), CNN(), CNN(width=6), one)
    assert float(found["kd"].count) == 12
    assert float(found["labels"].count) == float((one.labels != -100).sum()) == 8
    unlabelled = Batch(inputs=one.inputs)
    assert list(terms(KD(), CNN(), CNN(width=6), unlabelled)) == ["kd"]
    assert list(terms(KD(alpha=1), CNN(), CNN(width=6), one)) == ["kd"]


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"temperature": -1.0}, {"alpha": 1.5}, {"alpha": -0.1}])
def test_kd_refuses_settings_out_of_range(wrong):
    with pytest.raises(InputError, match=f"KD: {next(iter(wrong))} is"):
        KD(**wrong)


def test_attention_needs_maps_and_says_so_before_training():
    with pytest.raises(
        ShapeError, match=r"AttentionTransfer cannot use this batch: .*\(batch, channels, height, width\)"
    ):
        terms(AttentionTransfer("fc", "fc"), CNN(), CNN(width=6), batch())


def test_attention_matches_maps_of_different_size():
    found = terms(AttentionTransfer("layer1", "layer2"), CNN(), CNN(width=6), batch())
    assert found["attention"].mean.item() > 0


def test_rkd_leaves_out_what_weighs_nothing():
    assert list(terms(RKD(angle=0), CNN(), CNN(width=6), batch())) == ["distance"]
    assert list(terms(RKD(distance=0), CNN(), CNN(width=6), batch())) == ["angle"]


def test_hints_count_scored_tokens_only():
    one = text()
    found = terms(Hints("blocks.0", "blocks.0"), language_model(), language_model(1, dim=12), one)
    assert float(found["hints"].count) == float(one.mask.sum())

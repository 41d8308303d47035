"""Low-Rank Clone: what it is in the limit, what its terms reach, and how its KL counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import digest, language_model, ragged_tokens, trainer
from torch import nn
from weights.examples_growth import llama

from transfuse.core.batch import Batch, line_up
from transfuse.core.errors import InputError, ShapeError
from transfuse.core.outputs import Outputs, call, find_logits
from transfuse.core.streams import as_data
from transfuse.losses import Projection
from transfuse.weights import LowRankClone
from transfuse.weights.low_rank_clone import TERMS

FULL = {"input_ids": torch.randint(11, (8, 8), generator=torch.Generator().manual_seed(0))}


def ready(method: LowRankClone, target: nn.Module, source: nn.Module, data: Any = FULL) -> tuple[Any, Batch]:
    t = trainer(method, target, source, data, task="language-model")
    t._start(False)
    return t.run, line_up(as_data(data).sample(12), "language-model")


def test_with_identities_for_projections_and_the_teachers_norms_it_is_the_teacher():
    teacher, student, method = llama(12, seed=1, attention_bias=True), llama(12, attention_bias=True), LowRankClone()
    run, batch = ready(method, student, teacher)
    with torch.no_grad():
        for z in method.maps.values():
            z.copy_(torch.eye(12))
        norms = dict(teacher.named_parameters())
        for name, p in student.named_parameters():
            if "norm" in name:
                p.copy_(norms[name] + 0.1)
                norms[name].copy_(p)
        terms = method.loss({"data": batch}, run)
        assert set(terms) == {"labels", "kl", *TERMS}
        assert all(float(term.sum) < 1e-6 for name, term in terms.items() if name != "labels")
        assert torch.allclose(
            method.run_composed(run, batch).logits, find_logits(call(teacher, batch.inputs)), atol=1e-6
        )


@pytest.mark.parametrize("tie", [True, False])
def test_folded_it_is_a_plain_model_with_the_same_answers(tie):
    teacher = llama(12, seed=1, tie_word_embeddings=tie)
    student, method = llama(10, tie_word_embeddings=tie), LowRankClone(std=0.3, tie_head=tie)
    t = trainer(method, student, teacher, ragged_tokens(), task="language-model")
    model = t.fit().eval()
    batch = as_data(ragged_tokens()).sample(12)
    with torch.no_grad():
        composed = find_logits(call(student.eval(), batch.inputs, method.compose(student)))
        assert (find_logits(call(model, batch.inputs)) - composed).abs().max() < 1e-4
    assert type(model) is type(student) and model.state_dict().keys() == student.state_dict().keys()
    assert model.config.hidden_size == 10 and model.config.head_dim == 6
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (12, 10)


def test_the_composed_output_layer_is_the_one_that_losses_use():
    teacher, student, method = llama(12, seed=1), llama(10), LowRankClone(std=0.3)
    run, batch = ready(method, student, teacher)
    raw = method.run_composed(run, batch).raw
    assert isinstance(raw, Projection)
    assert torch.allclose(raw.weight, teacher.lm_head.weight @ method.maps["embed"].T, atol=1e-6)
    assert raw.weight.requires_grad


@pytest.mark.parametrize(("inputs", "tie", "count"), [("all", True, 15), ("io", True, 11), ("all", False, 16)])
def test_only_projections_and_norms_are_trained(inputs, tie, count):
    teacher, student = llama(12, seed=1), llama(10)
    before, started = digest(teacher), {n: p.clone() for n, p in student.named_parameters()}
    method = LowRankClone(std=0.3, inputs=inputs, tie_head=tie)
    t = trainer(method, student, teacher, FULL, task="language-model")
    t.fit()
    assert len(method.maps) == count
    assert digest(teacher) == before and all(p.grad is None for p in teacher.parameters())
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, started[n])}
    assert moved == {n for n in started if "norm" in n} and len(moved) == 5


@pytest.mark.parametrize("term", TERMS)
def test_leaving_a_term_out_removes_exactly_that_one(term):
    teacher, student = llama(12, seed=1), llama(10)
    whole, part = LowRankClone(std=0.3), LowRankClone(std=0.3, without=[term])
    found = []
    for method in (whole, part):
        run, batch = ready(method, student, teacher)
        found.append({name: float(t.sum) for name, t in method.loss({"data": batch}, run).items()})
    assert found[0].pop(term) > 0
    assert found[0] == pytest.approx(found[1])


def test_an_attention_output_is_measured_before_the_projection_behind_it():
    method = LowRankClone(std=0.3)
    run, batch = ready(method, llama(10), llama(12, seed=1))
    student, teacher = method.run_composed(run, batch), run("source", batch, grad=False)
    method._pairs = method._pairs[:1]  # the first layer's terms alone
    clones = method.clones(run, student.features, teacher.features)
    o = method.maps["0/o"]
    for name, reaches in (("attention", False), ("q", False), ("gate", True), ("ffn", True)):
        found = torch.autograd.grad(clones[name].sum(), o, allow_unused=True, retain_graph=True)[0]
        assert (found is not None and bool(found.any())) == reaches, name
    down = torch.autograd.grad(clones["ffn"].sum(), method.maps["0/down"])[0]
    assert down.any(), "both sides of the perceptron's term move"


def test_the_terms_by_hand():
    teacher, student, method = llama(12, seed=1), llama(10), LowRankClone(std=0.3)
    run, batch = ready(method, student, teacher)
    with torch.no_grad():
        ours, theirs = method.run_composed(run, batch), run("source", batch, grad=False)
        found = method.clones(run, ours.features, theirs.features)
        q = o = ffn = 0.0
        for i in range(2):
            at = f"model.layers.{i}"
            q += (ours.features[f"{at}.self_attn.q_proj"] - theirs.features[f"{at}.self_attn.q_proj"]).square().mean(-1)
            W = teacher.model.layers[i].self_attn.o_proj.weight
            mixed = [x.features[f"{at}.self_attn.o_proj:input"] @ W.T for x in (ours, theirs)]
            o += (mixed[0] - mixed[1]).square().mean(-1)
            target = theirs.features[f"{at}.mlp.down_proj"] @ method.maps[f"{i}/down"].T
            ffn += (ours.features[f"{at}.mlp.down_proj"] - target).square().mean(-1)
        for name, expected in (("q", q), ("attention", o), ("ffn", ffn)):
            assert torch.allclose(found[name], expected, atol=1e-6), name


def kl_of(reduction: str, repeats: int) -> float:
    """Of a model that says the same at every position, with two tokens."""

    ours, theirs = (torch.tensor([0.0, gap]).expand(3, repeats, 2) for gap in (1.0, 3.0))
    method = LowRankClone(reduction=reduction, temperature=2.0)

    class Fake(dict):  # what the loss asks of a run
        def __call__(self, role: str, batch: Batch, grad: bool = True) -> Any:
            return Outputs(theirs)

    method.run_composed = lambda run, batch: Outputs(ours)  # type: ignore[method-assign]
    batch = line_up(Batch(inputs={"input_ids": torch.zeros(3, repeats, dtype=torch.long)}), "language-model")
    batch.labels, batch.mask = torch.zeros(3, repeats, dtype=torch.long), torch.ones(3, repeats, dtype=torch.bool)
    method.clones = lambda *_: {}  # type: ignore[method-assign]
    return float(method.loss({"data": batch}, Fake())["kl"].mean)


def test_the_kl_is_the_closed_form_and_doubles_with_the_length_as_the_authors_count_it():
    def p(gap: float) -> float:
        return 1 / (1 + math.exp(-gap / 2.0))

    a, b = p(3.0), p(1.0)
    expected = a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
    assert kl_of("token", 5) == pytest.approx(expected, rel=1e-5)
    assert kl_of("token", 10) == pytest.approx(expected, rel=1e-5)
    assert kl_of("batchmean", 5) == pytest.approx(5 * expected, rel=1e-5)
    assert kl_of("batchmean", 10) == pytest.approx(10 * expected, rel=1e-5)


def test_padding_counts_in_no_term():
    data = ragged_tokens()
    values = []
    for fill in (0, 7):
        tokens = data["input_ids"].masked_fill(data["attention_mask"] == 0, fill)
        method = LowRankClone(std=0.3)
        run, batch = ready(method, llama(10), llama(12, seed=1), {**data, "input_ids": tokens})
        values.append({name: float(t.sum) for name, t in method.loss({"data": batch}, run).items()})
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_arguments_and_models_that_do_not_fit_are_refused():
    for arguments, message in (
        ({"alpha": -1}, "alpha is -1"),
        ({"temperature": 0}, "temperature 0"),
        ({"reduction": "mean"}, "reduction is 'mean'"),
        ({"inputs": "some"}, "inputs is 'some'"),
        ({"without": ["o"]}, "expected a list of q, k, v"),
        ({"without": "q"}, "expected a list"),
    ):
        with pytest.raises(InputError, match=message):
            LowRankClone(**arguments)
    with pytest.raises(ShapeError, match="a clone is narrower"):
        ready(LowRankClone(), llama(16), llama(12))
    with pytest.raises(ShapeError, match="q_proj.weight is .18, 9., .* comes .12, 9."):
        ready(LowRankClone(), llama(9, heads=3), llama(12))
    with pytest.raises(InputError, match="separate layers for q, k, v"):
        ready(LowRankClone(), language_model(dim=8), language_model(dim=12))
    with pytest.raises(InputError, match="one weight in the target and two in the source"):
        ready(LowRankClone(), llama(10, tie_word_embeddings=True), llama(12))
    shuffled = trainer(LowRankClone(), llama(10), llama(12), FULL, task="language-model", shuffled=True)
    with pytest.raises(InputError, match="no shuffled arm"):
        shuffled.fit()

"""Fusion of logits against the closed forms of its sheet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import VOCABULARY, language_model, ragged_tokens
from torch import Tensor, nn

from transfuse import transfer
from transfuse.core.errors import InputError, VocabularyError
from transfuse.core.outputs import call
from transfuse.infer import DynamicFusion, FusedModel, StaticFusion
from transfuse.infer.dynamic_fusion import Distance

TEXT = ragged_tokens(6)


def logits(count: int, rows: int = 8, classes: int = 12, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(rows, classes, generator=draw, dtype=torch.float64) for _ in range(count)]


def test_where_the_large_model_is_the_base_the_expert_comes_out():
    base, expert = logits(2)
    alpha = DynamicFusion().weights(base, base, [expert])
    assert alpha.flatten().tolist() == pytest.approx([1.0] * 8, abs=1e-4)
    assert Distance(base, base, [expert])(torch.ones_like(alpha)).max() < 1e-20
    fused = DynamicFusion().fuse(base, base, [expert])
    assert torch.allclose(fused.softmax(-1), expert.softmax(-1), atol=1e-4)


def test_an_expert_that_did_not_move_moves_nothing():
    large, base = logits(2)
    assert (DynamicFusion().weights(large, base, [base.clone()]) == 0).all()
    assert torch.equal(DynamicFusion().fuse(large, base, [base.clone()]), large)


def test_constants_change_nothing():
    large, base, expert = logits(3)
    plain = DynamicFusion().weights(large, base, [expert])
    shifted = DynamicFusion().weights(large + 3, base - 1, [expert + torch.randn(8, 1)])
    assert torch.allclose(plain, shifted, atol=1e-6)


def test_with_two_tokens_the_solver_agrees_with_a_dense_grid_of_the_closed_form():
    large, base, expert = logits(3, rows=20, classes=2, scale=1.5)

    def kl(a: Tensor, b: Tensor) -> Tensor:  # of Bernoulli distributions by their logit gaps
        p = a.sigmoid()
        return p * (a - b) + torch.nn.functional.softplus(b) - torch.nn.functional.softplus(a)

    gaps = [one[:, 0] - one[:, 1] for one in (large, base, expert)]
    grid = torch.linspace(0, 2, 20_001, dtype=torch.float64)[:, None]
    moved = gaps[0] + grid * (gaps[2] - gaps[1])
    value = (kl(moved, gaps[0]) - kl(gaps[2], gaps[1])) ** 2 + (kl(gaps[0], moved) - kl(gaps[1], gaps[2])) ** 2
    wanted = grid[value.argmin(0), 0]
    assert torch.allclose(DynamicFusion().weights(large, base, [expert])[0], wanted, atol=2e-4)


def test_both_divergences_grow_with_the_weight():
    large, base, expert = logits(3, rows=500)
    problem = Distance(large, base, [expert])
    steps = [problem.divergences(torch.full((1, 500), a, dtype=torch.float64)) for a in torch.linspace(0, 2, 9)]
    for kind in range(2):
        values = torch.stack([step[kind] for step in steps])
        assert (values.diff(dim=0) >= -1e-12).all()
        assert values[0].abs().max() < 1e-12


def test_weights_stay_in_their_box_and_follow_their_experts():
    large, base, *experts = logits(5, rows=30, scale=3.0)
    for way in ("one", "joint"):
        alpha = DynamicFusion(way).weights(large, base, experts)
        assert alpha.min() >= 0
        assert alpha.max() <= 2
    one = DynamicFusion().weights(large, base, experts)
    assert ((one > 0).sum(0) <= 1).all()
    order = [2, 0, 1]
    assert torch.allclose(DynamicFusion().weights(large, base, [experts[i] for i in order]), one[order])
    problem = Distance(large, base, experts)
    assert (problem(DynamicFusion("joint").weights(large, base, experts)) <= problem(one) + 1e-12).all()


def fused(method: Any, **sources: nn.Module) -> FusedModel:
    given = {"base": language_model(1), "expert": language_model(2), **sources}
    large = language_model(0, dim=12)
    result = transfer(method, source=given, target=large, test=TEXT, task="language-model", steps=1, batch_size=4)
    assert isinstance(result.model, FusedModel)
    return result.model


def test_static_fusion_is_a_product_of_experts():
    model = fused(StaticFusion(alpha=0.5))
    large, base, expert = (call(m, TEXT).softmax(-1) for m in model.models)
    product = large * (expert / base) ** 0.5
    found = call(model, TEXT).softmax(-1)
    assert torch.allclose(found, product / product.sum(-1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("method", [StaticFusion(), DynamicFusion(), DynamicFusion("joint")], ids=repr)
def test_what_is_written_step_by_step_is_what_whole_passes_say(method):
    model = fused(method)
    prompts = torch.tensor([[1, 5, 2], [7, 0, 3]])
    tokens = prompts
    with torch.no_grad():
        for _ in range(4):
            tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(model.generate(prompts, new_tokens=4), tokens)
        step = model.logits_processor()(prompts, call(model.large, prompts)[:, -1])
        assert torch.allclose(step, model(prompts)[:, -1], atol=1e-4)


def test_nothing_is_trained_and_no_row_decides_for_another():
    model = fused(DynamicFusion())
    for found, given in zip(
        model.models, (language_model(0, dim=12), language_model(1), language_model(2)), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), given.parameters(), strict=True))
    with torch.no_grad():
        both = model(TEXT["input_ids"][:2], TEXT["attention_mask"][:2])
        alone = model(TEXT["input_ids"][:1], TEXT["attention_mask"][:1])
    assert torch.allclose(both[:1], alone, atol=1e-4)


class Padded(nn.Module):
    """A model with more outputs than tokens."""

    def __init__(self, model: nn.Module, extra: float = 0.0):
        super().__init__()
        self.model, self.extra, self.tokenizer = model, extra, list("abcdefghijk")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return nn.functional.pad(self.model(input_ids, attention_mask), (0, 5), value=self.extra)


def test_padded_output_layers_are_cut_and_excluded_tokens_stay_excluded():
    plain = fused(DynamicFusion())
    for model in plain.models:
        model.tokenizer = list("abcdefghijk")
    padded = FusedModel(Padded(plain.large), plain.base, plain.experts, plain.fuse)
    assert torch.allclose(call(padded, TEXT), call(plain, TEXT), atol=1e-4)
    same = [Padded(m, -torch.inf) for m in plain.models]
    excluded = call(FusedModel(same[0], same[1], same[2:], plain.fuse), TEXT)
    assert (excluded[..., VOCABULARY:] == -torch.inf).all()
    assert torch.allclose(excluded[..., :VOCABULARY], call(plain, TEXT), atol=1e-3)


def test_other_tokens_and_missing_sources_are_refused():
    model = fused(StaticFusion())
    model.large.tokenizer, model.base.tokenizer = list("abcdefghijk"), list("bacdefghijk")
    with pytest.raises(VocabularyError, match="mean different tokens"):
        call(model, TEXT)
    with pytest.raises(InputError, match="needs a small base model"):
        transfer(StaticFusion(), language_model(1), language_model(0), test=TEXT, task="language-model", steps=1)
    for wrong in (lambda: StaticFusion(-1.0), lambda: DynamicFusion("all")):
        with pytest.raises(InputError, match="Fusion"):
            wrong()

"""Upcycling: the mixture is the dense model at first, and its experts part afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import digest, language_model, ragged_tokens, trainer
from torch import Tensor, nn

from transfuse import transfer
from transfuse.core.batch import line_up
from transfuse.core.errors import InputError
from transfuse.core.outputs import call, find_logits
from transfuse.core.streams import as_data
from transfuse.models import DecoderLM
from transfuse.weights import ScaleOut, experts
from transfuse.weights.experts import Experts, top_k_gates, upcycled

TOKENS = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return find_logits(call(model.eval(), TOKENS))


def model_of(kind: str) -> nn.Module:
    import transformers as hf

    torch.manual_seed(0)
    if kind == "decoder":
        return language_model(depth=2)
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16))
    config = hf.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    return hf.LlamaForCausalLM(config)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("kind", ["decoder", "gpt2", "llama"])
def test_the_mixture_is_the_dense_model_at_first_whatever_the_router(kind, top_k, monkeypatch):
    dense = model_of(kind)
    for std in (0.02, 3.0):
        mixture, paths = upcycled(dense, 4, top_k, std)
        assert len(paths) == 2
        assert torch.allclose(logits(mixture), logits(dense), atol=1e-5)

    def unnormalised(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        best = scores.softmax(-1).topk(top_k, -1)
        return best.values, best.indices

    monkeypatch.setattr(experts, "top_k_gates", unnormalised)
    different = not torch.allclose(logits(mixture), logits(dense), atol=1e-5)
    assert different == (top_k < 4), "weights that do not sum to 1 must show"


def test_gates_sum_to_one_over_the_chosen():
    weights, chosen = top_k_gates(torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 5.0]]), 2)
    assert torch.allclose(weights.sum(1), torch.ones(2))
    assert chosen[0].tolist() == [1, 2] and set(chosen[1].tolist()) == {0, 2}


def test_each_token_is_given_to_its_own_experts():
    mixture = Experts([nn.Linear(2, 2, bias=False) for _ in range(3)], 2, 1, 1.0)
    with torch.no_grad():
        for e, expert in enumerate(mixture.experts):
            expert.weight.copy_(torch.eye(2) * (e + 1))
        mixture.router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    x = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [-1.0, -1.0]]])
    assert torch.equal(mixture(x), x * torch.tensor([1.0, 2.0, 3.0])[:, None])
    mixture(x[:, :1]).sum().backward()
    assert mixture.experts[0].weight.grad.abs().sum() > 0
    assert not any(expert.weight.grad.any() for expert in mixture.experts[1:])


def test_experts_part_with_a_random_router_and_never_with_equal_scores():
    model = trainer(ScaleOut(4, std=0.5), language_model(), None, ragged_tokens(), task="language-model").fit()
    first = [expert.fc1.weight for expert in model.blocks[0].mlp.experts]
    assert len({tuple(w.flatten().tolist()) for w in first}) == 4
    mixture, _ = upcycled(language_model(), 4, 2, 0.02)
    with torch.no_grad():
        mixture.blocks[0].mlp.router.weight.zero_()
    scores = mixture.blocks[0].mlp.router(torch.randn(20, 8))
    assert len(set(map(tuple, top_k_gates(scores, 2)[1].tolist()))) == 1, "ties all go to the same two"


def test_terms_weights_and_usage():
    method = ScaleOut(experts=3, balance=0.5, z=0.25)
    t = trainer(method, language_model(depth=2), None, ragged_tokens(), task="language-model")
    records: list[Any] = []
    t.listener = lambda trainer, record: records.append(record)
    model = t.fit()
    text = str(records[0])
    assert "balance" in text and "'z'" in text
    assert torch.allclose(method.usage.sum(1), torch.ones(2))
    assert type(model) is DecoderLM and all(p.requires_grad for p in model.parameters())


def test_padding_counts_in_no_loss_on_the_router():
    method = ScaleOut(experts=3)
    data = ragged_tokens()
    values = []
    for fill in (0, 7):
        tokens = data["input_ids"].masked_fill(data["attention_mask"] == 0, fill)
        t = trainer(method, language_model(), None, {**data, "input_ids": tokens}, task="language-model")
        t._start(False)
        batch = line_up(as_data({**data, "input_ids": tokens}).sample(12), "language-model")
        values.append({name: term.sum.item() for name, term in method.loss({"data": batch}, t.run).items()})
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_the_dense_target_stays_and_the_call_returns_the_mixture():
    dense = language_model(depth=2)
    before = digest(dense)
    result = transfer(ScaleOut(experts=3), None, dense, ragged_tokens(), task="language-model", steps=3, batch_size=6)
    assert digest(dense) == before
    assert isinstance(result.model.blocks[0].mlp, Experts)
    assert "Share of the tokens of each expert" in result.report.model_dump_json()


def test_arguments_and_models_that_do_not_fit_are_refused():
    for arguments, message in (({"top_k": 9}, "top_k is 9"), ({"std": 0}, "std 0"), ({"z": -1}, "z -1")):
        with pytest.raises(InputError, match=message):
            ScaleOut(**arguments)
    import transformers as hf

    bert = hf.BertForMaskedLM(
        hf.BertConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(InputError, match="no module of its own"):
        upcycled(bert, 4, 2, 0.1)
    with pytest.raises(InputError, match="ema averages"):
        trainer(ScaleOut(), language_model(), None, ragged_tokens(), task="language-model", ema=0.9).fit()

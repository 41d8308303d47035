"""Text is written as a loop by hand would write it, with caches and padding or without."""

from __future__ import annotations

import pytest
import torch
from helpers import language_model, llama
from torch import Tensor, nn

from transfuse.core.decoding import choose, generate, sequence_log_probability
from transfuse.core.errors import InputError
from transfuse.core.outputs import call

PROMPTS = torch.tensor([[1, 5, 2], [7, 0, 3]])


def by_hand(model: nn.Module, tokens: Tensor, count: int) -> Tensor:
    for _ in range(count):
        tokens = torch.cat([tokens, call(model, tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens


def test_the_most_likely_tokens_are_those_of_a_loop_by_hand():
    model = language_model().train()
    assert torch.equal(generate(model, PROMPTS, new_tokens=6), by_hand(language_model(), PROMPTS, 6))
    assert model.training


def test_a_cache_changes_nothing_and_agrees_with_the_model_s_own():
    model = llama()
    found = generate(model, PROMPTS, new_tokens=8)
    tokens = PROMPTS
    for _ in range(8):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, tokens)
    assert torch.equal(found, model.generate(PROMPTS, max_new_tokens=8, do_sample=False, attention_mask=PROMPTS >= 0))


@pytest.mark.parametrize("build", [language_model, llama])
def test_padding_on_the_left_changes_nothing(build):
    model = build()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), PROMPTS], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    found = generate(model, padded, mask=mask, new_tokens=5)
    assert torch.equal(found[:, 3:], generate(model, PROMPTS, new_tokens=5))


def test_a_model_reads_no_more_than_its_context():
    model = language_model()
    assert generate(model, PROMPTS, new_tokens=20).shape == (2, 23)


def test_an_ended_row_is_filled_up_and_all_ended_rows_end_the_text():
    model = language_model()
    free = generate(model, PROMPTS, new_tokens=6)
    end = int(free[0, 4])
    found = generate(model, PROMPTS, new_tokens=6, end=end)
    at = int((free[0, 3:] == end).nonzero()[0]) + 3
    assert (found[0, at:] == end).all()
    assert torch.equal(found[0, : at + 1], free[0, : at + 1])
    alone = generate(model, PROMPTS[:1], new_tokens=6, end=end)
    assert alone.shape[1] == at + 1


def test_draws_follow_the_generator_and_the_temperature():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, -1)
    draw = torch.Generator().manual_seed(0)
    shares = torch.bincount(choose(logits, 2.0, generator=draw), minlength=4) / 20_000
    assert torch.allclose(shares, (logits[0] / 2).softmax(-1), atol=0.02)
    few = torch.bincount(choose(logits, 1.0, top_k=2, generator=draw), minlength=4) / 20_000
    assert few.tolist() == pytest.approx([0.731, 0.269, 0, 0], abs=0.02)
    nucleus = torch.bincount(choose(logits, 1.0, top_p=0.8, generator=draw), minlength=4)
    assert nucleus[2:].tolist() == [0, 0]
    assert nucleus[:2].min() > 0
    drawn = [generate(language_model(), PROMPTS, new_tokens=5, temperature=1.0, generator=g) for g in seeds(3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


def test_several_models_write_together():
    a, b = language_model(0), language_model(1, dim=12)
    found = generate([a, b], PROMPTS, new_tokens=4, fuse=lambda logits: logits[0] + logits[1])
    tokens = PROMPTS
    for _ in range(4):
        tokens = torch.cat([tokens, (call(a, tokens) + call(b, tokens))[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, tokens)
    with pytest.raises(InputError, match="2 models need a function fuse"):
        generate([a, b], PROMPTS, new_tokens=1)


def test_the_probability_of_a_sequence_is_that_of_its_tokens():
    model = language_model()
    log_p = call(model, PROMPTS).log_softmax(-1)
    wanted = [sum(log_p[i, t, PROMPTS[i, t + 1]].item() for t in range(2)) for i in range(2)]
    assert sequence_log_probability(model, {"input_ids": PROMPTS}).tolist() == pytest.approx(wanted)


def test_wrong_prompts_are_refused():
    class Bare(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.zeros(*tokens.shape, 5)

    model = language_model()
    with pytest.raises(InputError, match="padded on the left"):
        generate(model, PROMPTS, mask=torch.tensor([[1, 1, 0], [1, 1, 1]]), new_tokens=1)
    with pytest.raises(InputError, match="cannot tell padding"):
        generate(Bare(), PROMPTS, mask=torch.tensor([[0, 1, 1], [1, 1, 1]]), new_tokens=1)
    assert generate(Bare(), PROMPTS, new_tokens=2).shape == (2, 5)
    with pytest.raises(InputError, match="at least one token"):
        generate(model, PROMPTS[:, :0], new_tokens=1)

"""Growth: what must stay the same, what must not, and where its weights come from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import language_model, ragged_tokens, trainer
from torch import Tensor, nn

from transfuse import transfer
from transfuse.core.errors import InputError, ShapeError
from transfuse.core.outputs import call, find_logits
from transfuse.models import DecoderLM
from transfuse.weights import ScaleUp
from transfuse.weights.growth import Growth, aki, copied, fpi, grown, load

TOKENS = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))
FPI = Growth(operator="fpi")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return find_logits(call(model.eval(), TOKENS)).float()


def decoder(dim: int, depth: int, heads: int, seed: int = 0, tie: bool = False) -> DecoderLM:
    torch.manual_seed(seed)
    model = DecoderLM(11, dim, depth, heads, 16, tie=tie)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def llama(width: int, layers: int = 2, heads: int = 2, groups: int = 2, inner: int = 12, **more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(width)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=4,
        attention_bias=True,
        max_position_embeddings=16,
        **more,
    )
    model = LlamaForCausalLM(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def gpt2(width: int, layers: int, heads: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(width)
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=width, n_layer=layers, n_head=heads, n_positions=16))


def grow(source: nn.Module, target: nn.Module, how: Growth = FPI, seed: int = 0) -> nn.Module:
    target = copy.deepcopy(target)
    load(target, grown(source, target, how, torch.Generator().manual_seed(seed)))
    return target


# Matrices


@pytest.mark.parametrize("mapping", ["circular", "random"])
@pytest.mark.parametrize("width", [5, 7, 10, 13])
def test_a_perceptron_without_norms_stays_the_same_at_any_width(width, mapping):
    draw, x = torch.Generator().manual_seed(width), torch.randn(8, 4)
    W, b = [torch.randn(5, 4), torch.randn(5, 5), torch.randn(3, 5)], [torch.randn(5), torch.randn(5), torch.randn(3)]
    g = [copied(5, width, mapping, draw) for _ in range(2)]
    V = [fpi(W[0], None, g[0]), fpi(W[1], g[0], g[1]), fpi(W[2], g[1], None)]
    c = [b[0][g[0]], b[1][g[1]], b[2]]

    def run(weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        hidden = x
        for weight, bias in zip(weights[:2], biases[:2], strict=True):
            hidden = (hidden @ weight.T + bias).relu()
        return hidden @ weights[2].T + biases[2]

    assert torch.allclose(run(V, c), run(W, b), atol=1e-5)


def test_the_papers_toy():
    """Two inputs become three, three inner units four."""
    first, following = torch.arange(6.0).view(3, 2) + 1, torch.arange(6.0).view(3, 2) + 10
    wide, after = (fpi(W, copied(2, 3), copied(3, 4)) for W in (first, following))
    assert torch.equal(wide[:3, 0], first[:, 0] / 2) and torch.equal(wide[:3, 2], first[:, 0] / 2)
    assert torch.equal(wide[:3, 1], first[:, 1]) and torch.equal(wide[3], wide[0])
    found = aki(wide, after, 3)
    assert torch.equal(found[:3], wide[:3]) and torch.equal(found[3], after[0])
    assert torch.equal(after[0], torch.tensor([5.0, 11.0, 5.0]))


# Whole models


@pytest.mark.parametrize("kind", ["decoder", "tied", "gpt2", "llama"])
def test_function_preserving_at_whole_multiples_with_norms(kind):
    source, target = {
        "decoder": lambda: (decoder(8, 2, 2), decoder(24, 2, 6, 1)),
        "tied": lambda: (decoder(8, 2, 2, tie=True), decoder(24, 2, 6, 1, tie=True)),
        "gpt2": lambda: (gpt2(8, 2, 2), gpt2(16, 2, 4)),
        "llama": lambda: (llama(8), llama(16, heads=4, groups=4, inner=17)),
    }[kind]()
    assert torch.allclose(logits(grow(source, target)), logits(source), atol=2e-5)
    assert not torch.allclose(logits(target), logits(source), atol=0.1)


@pytest.mark.parametrize("kind", ["decoder", "tied", "llama"])
def test_other_widths_are_inexact_with_norms_until_norm_exact(kind):
    """RMSNorm is filled with zeros, LayerNorm with the mean."""
    if kind == "llama":
        source, target = llama(8), llama(12, heads=3, groups=3, inner=15)
    else:
        source, target = (decoder(dim, 2, heads, tie=kind == "tied") for dim, heads in ((8, 2), (20, 5)))
    assert (logits(grow(source, target)) - logits(source)).abs().max() > 1e-2
    t = trainer(ScaleUp("fpi", norm_exact=True), copy.deepcopy(target), source, TOKENS, task="language-model")
    t._start(False)
    t.method.begin_stage(0, t.run)
    assert (logits(t.run["target"]) - logits(source)).abs().max() < 2e-5
    assert t.method.continuity[0].item() == pytest.approx(t.method.continuity[1].item(), abs=1e-5)


@pytest.mark.parametrize("mapping", ["circular", "random"])
def test_grouped_queries_stay_in_their_group(mapping):
    source, target = llama(8, heads=4, groups=2), llama(24, heads=6, groups=2, inner=20)
    wide = grow(source, target, Growth("fpi", mapping=mapping), seed=3)
    if mapping == "circular":
        assert torch.allclose(logits(wide), logits(source), atol=2e-5)
    old, new = (m.model.layers[0].self_attn for m in (source, wide))
    reads = wide.model.layers[0].self_attn.q_proj.bias.view(6, 4)  # biases are copied as they are
    for group in range(2):
        own = old.q_proj.bias.view(2, 2, 4)[group]
        for head in reads.view(2, 3, 4)[group]:
            assert any(torch.equal(head, known) for known in own)
    assert torch.equal(new.k_proj.bias, old.k_proj.bias)


def test_groups_that_differ_are_refused_and_equal_ones_are_not():
    with pytest.raises(InputError, match="in 2 groups, the target in 4: their number must stay"):
        grow(llama(8, heads=4, groups=2), llama(16, heads=8, groups=4))
    many = grow(llama(8, heads=2, groups=2), llama(16, heads=4, groups=2, inner=24))
    assert torch.allclose(logits(many), logits(llama(8, heads=2, groups=2)), atol=2e-5)


def test_aki_takes_new_rows_from_the_next_layer_and_the_last_layer_is_fpi():
    source, target = decoder(8, 3, 2), decoder(16, 3, 4, 1)
    plain, mixed = grow(source, target), grow(source, target, Growth())
    for i in (0, 1):
        own, after, found = plain.blocks[i], plain.blocks[i + 1], mixed.blocks[i]
        assert torch.equal(found.mlp.fc1.weight[:32], own.mlp.fc1.weight[:32])
        assert torch.equal(found.mlp.fc1.weight[32:], after.mlp.fc1.weight[32:])
        assert torch.equal(found.mlp.fc1.bias[32:], after.mlp.fc1.bias[32:])
        for part in range(3):
            rows = slice(16 * part + 8, 16 * part + 16)
            assert torch.equal(found.attn.qkv.weight[rows], after.attn.qkv.weight[rows])
            rows = slice(16 * part, 16 * part + 8)
            assert torch.equal(found.attn.qkv.weight[rows], own.attn.qkv.weight[rows])
        assert torch.equal(found.attn.proj.weight, own.attn.proj.weight)
        assert torch.equal(found.mlp.fc2.weight, own.mlp.fc2.weight)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.blocks[2].parameters(), mixed.blocks[2].parameters(), strict=True)
    )
    assert not torch.allclose(logits(mixed), logits(source), atol=1e-2)


def test_scope_and_consumer_choose_what_else_comes_from_the_next_layer():
    source, target = decoder(8, 2, 2), decoder(16, 2, 4, 1)
    plain = grow(source, target)
    own, after = plain.blocks[0].mlp.fc2.weight, plain.blocks[1].mlp.fc2.weight
    everything = grow(source, target, Growth(scope="all")).blocks[0].mlp.fc2.weight
    assert torch.equal(everything[8:], after[8:]) and torch.equal(everything[:8], own[:8])
    columns = grow(source, target, Growth(consumer="next")).blocks[0].mlp.fc2.weight
    assert torch.equal(columns[:, 32:], after[:, 32:]) and torch.equal(columns[:, :32], own[:, :32])


def test_with_equal_layers_aki_is_fpi():
    source, target = decoder(8, 3, 2), decoder(12, 3, 3, 1)
    for block in source.blocks[1:]:
        block.load_state_dict(source.blocks[0].state_dict())
    for how in (Growth(), Growth(scope="all", consumer="next")):
        one, other = grow(source, target), grow(source, target, how)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_depth_by_interpolation_or_stacking_and_silent_copies():
    source, target = decoder(8, 2, 2), decoder(8, 4, 2, 1)
    for depth, order in (("interpolation", [0, 0, 1, 1]), ("stacking", [0, 1, 0, 1])):
        deep = grow(source, target, Growth("fpi", depth))
        for block, i in zip(deep.blocks, order, strict=True):
            assert torch.equal(block.mlp.fc1.weight, source.blocks[i].mlp.fc1.weight)
        assert (logits(deep) - logits(source)).abs().max() > 1e-2
        assert torch.equal(logits(grow(source, target, Growth("fpi", depth, identity=True))), logits(source))


def test_a_random_map_is_one_for_the_stream_and_follows_the_seed():
    source, target = decoder(8, 2, 2), decoder(16, 2, 4, 1)
    how = Growth("fpi", mapping="random")
    one, again, other = (grow(source, target, how, seed) for seed in (1, 1, 2))
    assert torch.equal(logits(one), logits(again)) and not torch.equal(logits(one), logits(other))
    stream = one.embed_tokens.weight
    pairs = [(one.embed_positions.weight, source.embed_positions.weight), (stream, source.embed_tokens.weight)]
    copies = [[int((wide[:, i] == small.T).all(1).nonzero()) for i in range(16)] for wide, small in pairs]
    assert copies[0] == copies[1] and copies[0][:8] == list(range(8))
    norms = [torch.equal(one.blocks[1].norm2.weight, source.blocks[1].norm2.weight[torch.tensor(copies[0])])]
    assert all(norms)


def test_fpi_copies_get_equal_gradients_and_aki_breaks_that():
    source, target = decoder(8, 2, 2), decoder(16, 2, 4, 1)
    for how, same in ((FPI, True), (Growth(), False)):
        model = grow(source, target, how)
        nn.functional.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        gradient = model.blocks[0].mlp.fc1.weight.grad
        assert torch.allclose(gradient[:32], gradient[32:], atol=1e-6) == same


# The method


def test_it_grows_once_trains_and_says_what_growth_cost():
    source, target = language_model(depth=1), decoder(16, 2, 4, 1)
    result = transfer(
        ScaleUp("fpi"), source, target, ragged_tokens(), task="language-model", steps=30, batch_size=12, lr=1e-2
    )
    text = result.report.model_dump_json()
    assert "Loss before and after growth" in text and "A batch with the source's loss was seen after" in text
    assert type(result.model) is DecoderLM


def test_arguments_and_models_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="operator is 'copy', it must be 'aki' or 'fpi'"):
        ScaleUp("copy")
    with pytest.raises(InputError, match="depth is 'zip'"):
        ScaleUp(depth="zip")
    for target, message in (
        (decoder(4, 2, 1), "cannot grow to 4"),
        (decoder(8, 1, 2), "2 layers cannot grow to 1"),
        (decoder(16, 2, 2), "heads of size 4 cannot become heads of size 8"),
        (nn.Linear(3, 3), "no transformer blocks found in Linear"),
    ):
        with pytest.raises(InputError, match=message):
            grow(decoder(8, 2, 2), target)
    with pytest.raises(InputError, match="cannot grow to"):
        grow(llama(8, inner=12), llama(8, inner=8))
    with pytest.raises(ShapeError, match="with the same vocabulary"):
        grow(decoder(8, 2, 2), DecoderLM(13, 16, 2, 4, 16))
    with pytest.raises(InputError, match="their number must stay|in 4 groups"):
        grow(llama(8, heads=4, groups=4), llama(18, heads=6, groups=3))

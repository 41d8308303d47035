"""EMoE: experts are the units of the dense network, whatever model it is, and nothing is added or lost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import digest, language_model, ragged_tokens, trainer
from torch import Tensor, nn

from transfuse import transfer
from transfuse.core.batch import Batch, line_up
from transfuse.core.errors import InputError
from transfuse.core.outputs import call, find_logits
from transfuse.core.streams import as_data
from transfuse.models import DecoderLM, ViTTiny
from transfuse.weights import EMoE
from transfuse.weights.emoe import Router, effective_weight
from transfuse.weights.experts import balanced_clusters
from transfuse.weights.layout import layers_of, transposed

TOKENS = torch.randint(11, (6, 9), generator=torch.Generator().manual_seed(0))


def model_of(kind: str) -> nn.Module:
    import transformers as hf

    torch.manual_seed(0)
    if kind == "decoder":
        return language_model(depth=2)
    if kind == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=16))
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        if kind == "llama":
            model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=11, **sizes))
        else:
            model = hf.BertForMaskedLM(hf.BertConfig(vocab_size=11, max_position_embeddings=16, **sizes))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    return find_logits(call(model.eval(), tokens))


def begun(method: EMoE, model: nn.Module, data: Any = TOKENS, task: str = "language-model") -> tuple[Any, Batch]:
    t = trainer(method, model, None, data, task=task)
    t._start(False)
    method.begin_stage(0, t.run)
    return t.run, line_up(as_data(data).sample(12), task)


KINDS = ["decoder", "gpt2", "llama", "bert"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clusters", ["similar", "random"])
def test_with_all_experts_it_is_the_dense_network(kind, clusters):
    """So the output's bias counts once."""
    model = model_of(kind)
    method = EMoE(4, 4, layers=[0, 1], clusters=clusters)
    begun(method, model)
    assert torch.allclose(logits(method.deploy(model)), logits(model), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_with_fewer_it_is_the_dense_network_with_units_masked(kind):
    model = model_of(kind)
    method = EMoE(4, 1, layers=[-1])
    begun(method, model)
    router, layer = method.routers[0], layers_of(model)[-1]
    first, last = (model.get_submodule(path) for path in (layer.rise[0], layer.down))
    kept = {}

    def choose(module: nn.Module, args: Any) -> None:
        scores = args[0] @ torch.stack([effective_weight(module)[router.experts == e].mean(0) for e in range(4)]).T
        kept["mask"] = (router.experts == scores.argmax(-1, keepdim=True)).float()

    handles = [
        first.register_forward_pre_hook(choose),
        last.register_forward_pre_hook(lambda module, args: (args[0] * kept["mask"],)),
    ]
    expected = logits(model)
    for handle in handles:
        handle.remove()
    assert torch.allclose(logits(method.deploy(model)), expected, atol=1e-5)
    assert not torch.allclose(expected, logits(model), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_added_and_dense_again_it_has_the_same_bits(kind):
    model = model_of(kind)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for dense in (False, True):
        method = EMoE(4, 2, layers=[0, 1], dense=dense)
        begun(method, model)
        found = method.deploy(model)
        assert [name for name, _ in found.named_parameters()] == [*before]
        assert all(torch.equal(p, before[name]) for name, p in found.named_parameters())
        assert (len(found.state_dict()) == len(model.state_dict())) == dense
    assert torch.equal(logits(found), logits(model))
    assert not [*method.parameters()]


def test_the_deployed_model_says_what_was_trained_and_can_be_copied():
    model, method = model_of("decoder"), EMoE(4, 2, layers=[0, 1])
    run, batch = begun(method, model)
    run.set_modes(set())
    with torch.no_grad():
        trained = method.routed(run, batch).logits
    deployed = method.deploy(model)
    assert torch.allclose(logits(deployed), trained, atol=1e-6)
    again = copy.deepcopy(deployed)
    assert torch.equal(logits(again), logits(deployed))
    with torch.no_grad():
        again.blocks[0].mlp.fc1.router.gate.neg_()
    assert not torch.equal(logits(again), logits(deployed)), "a copy routes by its own gate"
    assert torch.equal(logits(deployed, TOKENS[:2]), logits(deployed)[:2]), "and without noise"


# Clusters


def test_clusters_are_of_equal_size_and_two_bundles_are_found():
    torch.manual_seed(0)
    base = torch.randn(2, 6)
    which = torch.randperm(20) % 2
    rows = base[which] * torch.rand(20, 1).add(0.5) + 0.01 * torch.randn(20, 6)
    found = balanced_clusters(rows, 2)
    assert torch.equal(found, which) or torch.equal(found, 1 - which)
    many = balanced_clusters(torch.randn(24, 5), 6)
    assert torch.equal(many.bincount(), torch.full((6,), 4))
    assert torch.equal(many, balanced_clusters(torch.randn(24, 5), 6)) is False


def test_clusters_depend_on_directions_alone():
    rows = torch.randn(24, 5)
    assert torch.equal(balanced_clusters(rows, 4), balanced_clusters(rows * torch.rand(24, 1).add(0.1), 4))


def test_what_cannot_be_split_is_refused():
    for rows, clusters, message in (
        (torch.randn(10, 3), 4, "10 units cannot be split into 4"),
        (torch.full((4, 2), float("nan")), 2, "not finite"),
    ):
        with pytest.raises(InputError, match=message):
            balanced_clusters(rows, clusters)
    with pytest.raises(InputError, match="32 units cannot be split into 5"):
        begun(EMoE(5, 2), model_of("decoder"))


# The gate


def test_the_gate_is_the_mean_of_each_experts_rows_and_follows_them():
    model, method = model_of("decoder"), EMoE(4, 2, layers=[1])
    run, batch = begun(method, model)
    router, weight = method.routers[0], model.blocks[1].mlp.fc1.weight

    def means() -> Tensor:
        return torch.stack([weight[router.experts == e].mean(0) for e in range(4)])

    assert torch.allclose(router.gate, means(), atol=1e-6)
    with torch.no_grad():
        weight.add_(torch.randn_like(weight))
    stale = router.gate.clone()
    assert not torch.allclose(stale, means(), atol=1e-3)
    router.follow(effective_weight(model.blocks[1].mlp.fc1), 0.25)
    assert torch.allclose(router.gate, 0.25 * stale + 0.75 * means(), atol=1e-6)
    method.after_update(None, {}, run)
    assert torch.allclose(router.gate, means(), atol=1e-6)
    method.loss({"data": batch}, run)["labels"].sum.backward()
    assert router.gate.grad is None and weight.grad is not None


def test_after_training_the_gate_is_that_of_the_weights_at_hand():
    model, method = model_of("decoder"), EMoE(4, 2, layers=[1])
    found = trainer(method, model, None, ragged_tokens(), task="language-model").fit()
    router, weight = found.blocks[1].mlp.fc1.router, found.blocks[1].mlp.fc1.weight
    for e in range(4):
        assert torch.allclose(router.gate[e], weight[router.experts == e].mean(0), atol=1e-6)


def test_chosen_experts_count_with_one_whatever_their_scores():
    model, method = model_of("decoder"), EMoE(4, 2, layers=[0, 1])
    begun(method, model)
    deployed = method.deploy(model)
    before = logits(deployed)
    with torch.no_grad():
        for block in deployed.blocks:
            block.mlp.fc1.router.gate.mul_(7.0)
    assert torch.equal(logits(deployed), before)


def test_experts_that_were_not_chosen_get_no_gradient():
    model, method = model_of("decoder"), EMoE(4, 1, layers=[0], noise=0.0)
    begun(method, model)
    found = method.deploy(model)
    found(torch.tensor([[3]])).sum().backward()
    mlp = found.blocks[0].mlp
    units = [mlp.fc1.weight.grad.any(1), mlp.fc1.bias.grad != 0, mlp.fc2.weight.grad.any(0)]
    assert all(torch.equal(u, units[0]) for u in units)
    (expert,) = mlp.fc1.router.experts[units[0]].unique()
    assert int(units[0].sum()) == 8 and bool((mlp.fc1.router.experts[~units[0]] != expert).all())


def test_noise_is_for_training_alone():
    rows = torch.randn(8, 4)
    router = Router(rows, 4, 1, noise=50.0, learned=False)
    router.assign(torch.arange(8) % 4, rows)
    x = torch.randn(30, 4)
    masks = []
    for training in (True, True, False, False):
        router.train(training).read(x)
        masks.append(router._weights)
    assert not torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert all(torch.equal(mask.sum(-1), torch.full((30,), 2.0)) for mask in masks)


def test_a_learned_gate_weighs_its_experts_and_is_trained():
    model, method = model_of("decoder"), EMoE(4, 2, layers=[1], gate="learned")
    t = trainer(method, model, None, ragged_tokens(), task="language-model")
    t._start(False)
    started = method.routers[0].centres.clone()
    method = EMoE(4, 2, layers=[1], gate="learned")
    found = trainer(method, model_of("decoder"), None, ragged_tokens(), task="language-model").fit()
    assert not torch.equal(method.routers[0].centres, started)
    router = found.blocks[1].mlp.fc1.router
    router.read(torch.randn(5, 8))
    assert torch.allclose(router._weights.sum(-1), torch.full((5,), 8.0), atol=1e-5), (
        "8 units of each, weights sum to 1"
    )


# Models of all kinds


def test_adapters_are_trained_and_the_gate_follows_the_effective_weight():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model_of("gpt2"), LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))
    method = EMoE(4, 2, layers=[1])
    t = trainer(method, model, None, TOKENS, task="language-model")
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    t.fit()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    layer = model.get_submodule(layers_of(model)[1].rise[0])
    whole = (layer.base_layer.weight + layer.get_delta_weight("default")).T
    router = method.routers[0]
    base = torch.stack([layer.base_layer.weight.T[router.experts == e].mean(0) for e in range(4)])
    assert torch.allclose(effective_weight(layer), whole, atol=1e-6)
    assert torch.allclose(router.gate[2], whole[router.experts == 2].mean(0), atol=1e-6)
    assert not torch.allclose(router.gate, base, atol=1e-6)


def test_gpt2_stores_its_weight_the_other_way_round():
    layer = layers_of(model := model_of("gpt2"))[0]
    first = model.get_submodule(layer.rise[0])
    assert transposed(first) and effective_weight(first).shape == (32, 8) and first.weight.shape == (8, 32)


def test_an_image_model_is_tuned_with_the_one_call_and_a_random_one_is_pointed_out():
    torch.manual_seed(0)
    model = ViTTiny(4, 2, dim=24, depth=2, heads=2, classes=3)
    data = torch.randn(12, 1, 4, 4), torch.arange(12) % 3
    before = digest(model)
    result = transfer(EMoE(4, 2), None, model, data, test=data, steps=2, batch_size=6)
    assert digest(model) == before and type(result.model) is ViTTiny
    text = result.report.model_dump_json()
    assert "Share of the tokens that use each expert" in text and "is the target trained?" in text


def test_arguments_out_of_range_are_refused():
    for arguments, message in (
        ({"top_k": 65}, "top_k is 65"),
        ({"gate": "cosine"}, "gate is 'cosine'"),
        ({"clusters": "none"}, "clusters is 'none'"),
        ({"noise": -1}, "noise is -1"),
        ({"momentum": 1}, "momentum 1"),
        ({"layers": []}, r"layers \[\]"),
    ):
        with pytest.raises(InputError, match=message):
            EMoE(**arguments)
    with pytest.raises(InputError, match="layers names block 2, the target has 2"):
        begun(EMoE(4, 2, layers=[2]), model_of("decoder"))
    with pytest.raises(InputError, match="no transformer blocks"):
        begun(EMoE(4, 2), nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11)))
    with pytest.raises(InputError, match="blocks|layers"):
        begun(EMoE(4, 2), DecoderLM(11, 8, 1, 2, 16))

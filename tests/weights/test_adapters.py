"""The adapter bank, AdapterFusion and ScaLearn: what the sheets say must hold exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import digest
from torch import Tensor, nn
from weights.examples_adapters import DEPTH, DIM, TASKS, Encoder, source, sources, tokens

from transfuse import transfer
from transfuse.core.batch import Batch
from transfuse.core.checkpoint import load_weights, save_weights
from transfuse.core.errors import InputError
from transfuse.core.run import Run
from transfuse.core.streams import as_data
from transfuse.core.watch import TransferWarning
from transfuse.losses import cross_entropy
from transfuse.weights import AdapterFusion, BottleneckAdapter, ScaLearn
from transfuse.weights.adapterfusion import Fusion, attention_of
from transfuse.weights.adapters import (
    Adapted,
    Bottleneck,
    adapted_layers,
    backbone_state,
    concatenated,
    with_adapters,
)
from transfuse.weights.scalearn import Scaling

INPUTS = {name: value for name, value in tokens().items() if name != "labels"}
OPTIONS: dict[str, Any] = {"steps": 6, "batch_size": 6, "lr": 0.02, "optimizer": "adam", "task": "classification"}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS)


def ready(method: Any, given: Any, target: nn.Module | None = None) -> tuple[Run, nn.Module]:
    """The run of a method that has been set up, and its model."""
    named = {f"source.{name}": model for name, model in given.items()}
    run = Run({"target": target or Encoder(), **named}, {"data": as_data(tokens())})
    run.set_modes(set())
    torch.manual_seed(3)
    method.setup(run, Batch.of(tokens()))
    return run, run["adapted"].eval()


def with_head(model: nn.Module, target: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    other.head = copy.deepcopy(target.head)
    return other


def set_coefficients(model: nn.Module, values: Tensor) -> None:
    """`(sources,)` for all layers."""
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.combine.weight.copy_(values[:, None].expand_as(layer.combine.weight))


# The bank


def test_an_adapter_is_added_to_the_output_of_its_layer():
    layer, adapter = nn.Linear(4, 6), Bottleneck(6, 2)
    x = torch.randn(5, 4)
    h = layer(x)
    z = (h @ adapter.down.weight.T + adapter.down.bias).relu() @ adapter.up.weight.T + adapter.up.bias
    assert torch.allclose(Adapted(layer, [adapter])(x), h + z, atol=1e-6)


def test_training_an_adapter_moves_only_it_and_the_head():
    backbone = Encoder()
    model = transfer(BottleneckAdapter("blocks.*.mlp", 2), None, backbone, tokens(), **OPTIONS).model
    assert list(adapted_layers(model)) == [f"blocks.{i}.mlp" for i in range(DEPTH)]
    after = backbone_state(model)
    assert {k for k, v in backbone.state_dict().items() if not torch.equal(v, after[k])} == {"head.weight", "head.bias"}
    assert all(float(layer.adapters[0].up.bias.detach().abs().max()) > 0 for layer in adapted_layers(model).values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_was_trained_can_be_saved_and_loaded_into_a_fresh_backbone(tmp_path):
    model = transfer(BottleneckAdapter("blocks.*.mlp", 2), None, Encoder(), tokens(), **OPTIONS).model
    save_weights(tmp_path / "adapter.safetensors", model)
    again = with_adapters(Encoder(seed=9), "blocks.*.mlp", 2, INPUTS)
    load_weights(tmp_path / "adapter.safetensors", again)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("method", [AdapterFusion(), ScaLearn(), ScaLearn(uniform=True, shared=True)])
def test_combining_leaves_backbone_and_sources_bit_identical(method):
    backbone, given = Encoder(), sources()
    before = digest(backbone), {name: digest(m) for name, m in given.items()}
    answers = {name: logits(m) for name, m in given.items()}
    model = transfer(method, given, backbone, tokens(), **OPTIONS).model
    assert (digest(backbone), {name: digest(m) for name, m in given.items()}) == before
    assert all(torch.equal(logits(m), answers[name]) for name, m in given.items())
    after = backbone_state(model)
    assert {k for k, v in backbone.state_dict().items() if not torch.equal(v, after[k])} == {"head.weight", "head.bias"}


def test_fused_adapters_are_those_of_the_sources_bit_for_bit():
    given = sources()
    model = transfer(AdapterFusion(), given, Encoder(), tokens(), **OPTIONS).model
    for path, layer in adapted_layers(model).items():
        for ours, theirs in zip(layer.adapters, given.values(), strict=True):
            assert digest(ours) == digest(adapted_layers(theirs)[path].adapters[0])


# AdapterFusion


def test_one_adapter_gets_all_attention_so_that_fusion_starts_as_it():
    target = Encoder()
    _, model = ready(AdapterFusion(), sources(1), target)
    alone = with_head(source(0), target)
    assert (logits(model) - logits(alone)).abs().max() < 1e-4
    for layer in adapted_layers(model).values():
        with torch.no_grad():
            layer.combine.value.weight.copy_(torch.eye(DIM))
    assert torch.equal(logits(model), logits(alone))


def test_the_order_of_adapters_permutes_attention_and_nothing_else():
    fusion, h, z = Fusion(4), torch.randn(2, 5, 4), torch.randn(3, 2, 5, 4)
    for p in fusion.parameters():
        nn.init.normal_(p)
    order = [2, 0, 1]
    assert torch.allclose(fusion.attention(h, z)[order], fusion.attention(h, z[order]), atol=1e-6)
    assert torch.allclose(fusion(h, z), fusion(h, z[order]), atol=1e-5)


def test_of_identical_adapters_it_takes_equal_parts():
    fusion, h, z = Fusion(4, dynamic=False), torch.randn(2, 4), torch.randn(2, 4)
    same = z.expand(3, 2, 4)
    assert torch.allclose(fusion.attention(h, same), torch.full((3, 2), 1 / 3))
    assert torch.allclose(fusion(h, same), z, atol=1e-6)


def test_equal_scores_average_the_outputs():
    fusion = Fusion(1, dynamic=False)
    nn.init.zeros_(fusion.query.weight)
    layer = Adapted(nn.Identity(), [_Constant(1.0), _Constant(3.0)], fusion)
    assert layer(torch.full((1, 1), 5.0)).item() == pytest.approx(2.0 + 5.0)


def test_values_stay_near_the_identity_by_a_penalty_with_a_known_gradient():
    fusion = Fusion(3)
    with torch.no_grad():
        fusion.value.weight.copy_(torch.eye(3))
    assert fusion.penalty().item() == 0
    nn.init.normal_(fusion.value.weight)
    (gradient,) = torch.autograd.grad(0.01 * fusion.penalty(), fusion.value.weight)
    assert torch.allclose(gradient, 0.02 * (fusion.value.weight - torch.eye(3)), atol=1e-7)


def test_the_penalty_counts_every_layer_with_its_weight():
    method = AdapterFusion(decay=0.5)
    run, _ = ready(method, sources())
    terms = method.losses({"data": Batch.of(tokens())}, run)
    assert terms["identity"].weight == 0.5
    assert terms["identity"].sum.item() == pytest.approx(DEPTH * DIM * (DIM - 1) * 1e-12, rel=1e-3)
    assert "identity" not in (static := AdapterFusion(dynamic=False)).losses(
        {"data": Batch.of(tokens())}, ready(static, sources())[0]
    )


@pytest.mark.parametrize(("dynamic", "count"), [(True, 3 * DIM**2 + 2 * DIM), (False, 2 * DIM**2 + 2 * DIM)])
def test_fusion_trains_what_the_paper_counts(dynamic, count):
    method = AdapterFusion(dynamic=dynamic)
    ready(method, sources())
    assert sum(p.numel() for p in method.inserted.values()) == DEPTH * count
    assert sum(p.numel() for p in method.head.values()) == 3 * DIM + 3


def test_attention_is_reported_by_layer_and_source_over_real_tokens():
    method = AdapterFusion()
    _, model = ready(method, sources())
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.combine.query.weight)
        nn.init.normal_(layer.combine.key.weight)
    found = attention_of(model, INPUTS)
    assert found.shape == (DEPTH, TASKS)
    assert torch.allclose(found.sum(1), torch.ones(DEPTH))
    padded = {**INPUTS, "input_ids": torch.where(INPUTS["attention_mask"].bool(), INPUTS["input_ids"], 7)}
    assert torch.allclose(attention_of(model, padded), found, atol=1e-6)


def test_the_report_shows_attention():
    result = transfer(AdapterFusion(), sources(), Encoder(), tokens(), test=tokens(6, seed=1), **OPTIONS)
    (panel,) = result.report.model_dump()["panels"][-1:]
    assert panel["columns"][-TASKS:] == ["task0", "task1", "task2"]
    assert len(panel["values"]) == DEPTH


# ScaLearn


@pytest.mark.parametrize("method", [ScaLearn(), ScaLearn(uniform=True), ScaLearn(shared=True)])
def test_one_coefficient_of_one_reproduces_that_adapter_bit_for_bit(method):
    target = Encoder()
    _, model = ready(method, sources(), target)
    set_coefficients(model, torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(logits(model), logits(with_head(source(1), target)))


def test_coefficients_of_zero_leave_the_backbone():
    target = Encoder()
    _, model = ready(ScaLearn(), sources(), target)
    set_coefficients(model, torch.zeros(3))
    assert torch.equal(logits(model), logits(target))


def test_a_layer_is_linear_in_its_coefficients():
    h, z = torch.randn(4, 6), torch.randn(3, 4, 6)
    one, other = torch.randn(3, 6), torch.randn(3, 6)

    def out(w: Tensor) -> Tensor:
        return Scaling(nn.Parameter(w), 6).eval()(h, z)

    assert torch.allclose(out(one + other), out(one) + out(other), atol=1e-5)


@pytest.mark.parametrize(
    ("uniform", "shared", "count"),
    [
        (False, False, TASKS * DIM * DEPTH),
        (True, False, TASKS * DEPTH),
        (False, True, TASKS * DIM),
        (True, True, TASKS),
    ],
)
def test_the_four_variants_have_as_many_coefficients_as_the_paper_counts(uniform, shared, count):
    method = ScaLearn(uniform=uniform, shared=shared)
    ready(method, sources())
    assert sum(p.numel() for p in method.inserted.values()) == count


@pytest.mark.parametrize("uniform", [False, True])
def test_the_gradient_of_a_shared_tensor_is_the_sum_of_its_layers(uniform):
    grads = {}
    for shared in (False, True):
        method = ScaLearn(uniform=uniform, shared=shared)
        run, model = ready(method, sources())
        set_coefficients(model, torch.tensor([0.4, 0.5, 0.6]))
        loss = method.losses({"data": Batch.of(tokens())}, run)["labels"].mean
        grads[shared] = torch.autograd.grad(loss, list(method.inserted.values()))
    assert len(grads[True]) == 1
    assert torch.allclose(grads[True][0], sum(grads[False]), atol=1e-6)


def test_the_gradient_of_a_coefficient_is_what_its_adapter_would_have_changed():
    h, z, g = torch.randn(4, 6), torch.randn(3, 4, 6), torch.randn(4, 6)
    for width, expected in ((6, (g * z).sum(1)), (1, (g * z).sum((1, 2)).unsqueeze(1))):
        weight = nn.Parameter(torch.randn(3, width))
        (found,) = torch.autograd.grad((Scaling(weight, 6)(h, z) * g).sum(), weight)
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("method", [ScaLearn(), ScaLearn(uniform=True, shared=True), ScaLearn(softmax=True)])
def test_one_wide_adapter_is_the_scaled_sum(method):
    _, model = ready(method, sources())
    for p in method.inserted.values():
        nn.init.normal_(p)
    wide = concatenated(model)
    assert (logits(wide) - logits(model)).abs().max() < 1e-5
    layer = adapted_layers(wide)["blocks.0.mlp"]
    assert len(layer.adapters) == 1 and layer.combine is None
    assert layer.adapters[0].down.out_features == TASKS * DIM // 2


def test_what_it_deploys_can_be_a_source_again():
    wide = transfer(ScaLearn(), sources(), Encoder(), tokens(), **OPTIONS).model
    model = transfer(ScaLearn(), {"wide": wide, "task": source(0)}, Encoder(), tokens(), **OPTIONS).model
    assert adapted_layers(model)["blocks.0.mlp"].adapters[0].down.out_features == (TASKS + 1) * DIM // 2


def test_coefficients_are_dropped_while_training_only_and_keep_their_mean():
    scaling = Scaling(nn.Parameter(torch.tensor([[1.5]])), 1, dropout=0.3)
    h, z = torch.zeros(1, 1), torch.ones(1, 1, 1)
    torch.manual_seed(0)
    drawn = torch.tensor([scaling.train()(h, z).item() for _ in range(5000)])
    error = 1.5 * (0.3 / 0.7) ** 0.5 / 5000**0.5
    assert abs(drawn.mean().item() - 1.5) < 4 * error
    kept = drawn[drawn != 0]
    assert 0.25 < 1 - len(kept) / 5000 < 0.35 and torch.allclose(kept, torch.tensor(1.5 / 0.7))
    assert scaling.eval()(h, z).item() == 1.5


def test_coefficients_start_at_a_sum_of_two_and_are_left_by_it():
    method = ScaLearn(dropout=0.0)
    ready(method, sources())
    assert (method.coefficients().sum(1) - 2).abs().max() < 0.01
    trained = transfer(ScaLearn(lr_scale=20), sources(), Encoder(), tokens(), test=tokens(6), **OPTIONS)
    (panel,) = trained.report.model_dump()["panels"][-1:]
    assert any(abs(row[-1] - 2) > 0.05 for row in panel["values"])


def test_coefficients_do_not_decay_and_with_a_rate_of_zero_stay():
    groups = ScaLearn().groups()
    assert groups[0]["weight_decay"] == 0.0
    method = ScaLearn(lr_scale=0, total=1.0, dropout=0.0)
    _, model = ready(method, sources())
    wide = transfer(method, sources(), Encoder(), tokens(), **OPTIONS).model
    up = adapted_layers(wide)["blocks.0.mlp"].adapters[0].up.weight
    theirs = adapted_layers(source(0))["blocks.0.mlp"].adapters[0].up.weight
    assert torch.allclose(up[:, : DIM // 2], theirs / 3, atol=0.02)
    assert model is not wide


def test_dropout_of_a_single_source_is_warned_of():
    with pytest.warns(TransferWarning, match="use dropout=0"):
        transfer(ScaLearn(), sources(1), Encoder(), tokens(), **OPTIONS)


def test_the_softmax_ablation_averages():
    scaling = Scaling(nn.Parameter(torch.zeros(4, 2)), 2, softmax=True)
    z = torch.randn(4, 3, 2)
    assert torch.allclose(scaling.eval()(z[0], z), z.mean(0), atol=1e-6)


# Learning


@pytest.mark.parametrize("method", [BottleneckAdapter("blocks.*.mlp", 2), AdapterFusion(), ScaLearn()])
def test_labels_are_learned(method):
    given = None if isinstance(method, BottleneckAdapter) else sources()
    data = tokens(24)
    settings = {**OPTIONS, "steps": 60, "batch_size": 24}
    model = transfer(method, given, Encoder(), data, **settings).model.eval()

    def loss(m: nn.Module) -> float:
        return cross_entropy(m(data["input_ids"], data["attention_mask"]), data["labels"]).mean().item()

    assert loss(model) < 0.8 * loss(Encoder())


# Errors


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: BottleneckAdapter(reduction=0), "at least 1"),
        (lambda: AdapterFusion(decay=-1), "negative"),
        (lambda: ScaLearn(dropout=1.0), r"\[0, 1\)"),
        (lambda: ScaLearn(lr_scale=-1), "negative"),
    ],
)
def test_arguments_are_checked(make, match):
    with pytest.raises(InputError, match=match):
        make()


def test_another_backbone_is_refused_by_the_name_of_what_differs():
    given = {"same": source(0), "other": source(1, backbone=Encoder(seed=5))}
    with pytest.raises(InputError, match=r"'source.other' was trained on another backbone.*'embed.weight'"):
        transfer(AdapterFusion(), given, Encoder(), tokens(), **OPTIONS)


def test_sources_need_adapters_and_the_same_layers():
    with pytest.raises(InputError, match="has no adapters"):
        transfer(ScaLearn(), {"bare": Encoder(seed=0)}, Encoder(), tokens(), **OPTIONS)
    half = with_adapters(Encoder(), "blocks.0.mlp", 2, INPUTS)
    with pytest.raises(InputError, match="train all with the same layers"):
        transfer(ScaLearn(), {"all": source(0), "half": half}, Encoder(), tokens(), **OPTIONS)
    fused = transfer(AdapterFusion(), sources(), Encoder(), tokens(), **OPTIONS).model
    with pytest.raises(InputError, match="several adapters"):
        transfer(ScaLearn(), {"fused": fused}, Encoder(), tokens(), **OPTIONS)
    with pytest.raises(InputError, match="has adapters already"):
        transfer(ScaLearn(), sources(), source(0, classes=3), tokens(), **OPTIONS)


def test_a_bottleneck_of_nothing_is_refused():
    with pytest.raises(InputError, match="narrower than reduction=16"):
        transfer(BottleneckAdapter("blocks.*.mlp"), None, Encoder(), tokens(), **OPTIONS)


class _Constant(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.value = value

    def forward(self, h: Tensor) -> Tensor:
        return torch.full_like(h, self.value)

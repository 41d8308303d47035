"""Weight Squeezing: closed forms of its maps, gradients and gates, and the models that it reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import CNN, digest, images, language_model, ragged_tokens, trainer
from torch import nn

from transfuse import transfer
from transfuse.core.batch import Batch, line_up
from transfuse.core.errors import InputError, ShapeError
from transfuse.core.outputs import call, find_logits
from transfuse.core.streams import as_data
from transfuse.losses import Projection
from transfuse.models import MLP, DecoderLM, ViTTiny
from transfuse.weights import WeightSqueezing
from transfuse.weights.maps import Copies, along, counterparts, gaussian, interpolated, key_of, stacked

PICTURES = torch.randn(12, 1, 4, 4), torch.arange(12) % 3


def mlp(width: int, seed: int = 0, depth: int = 1) -> MLP:
    torch.manual_seed(seed)
    return MLP(16, [width] * depth, 3)


def ready(method: WeightSqueezing, target: nn.Module, source: nn.Module, data: Any = PICTURES, **options: Any) -> Any:
    """The run after setup, with a batch."""
    t = trainer(method, target, source, data, **options)
    t._start(False)
    sample = line_up(as_data(data).sample(12), t.run.task)
    return t.run, Batch(sample)


# Maps


def test_a_map_along_each_axis_is_a_product_from_both_sides():
    W, L, R = torch.randn(5, 7), torch.randn(2, 5), torch.randn(3, 7)
    assert torch.allclose(along(W, [L, R]), L @ W @ R.T, atol=1e-6)
    assert along(W, [None, None]) is W
    kernel = torch.randn(5, 7, 3, 3)
    assert torch.allclose(along(kernel, [L, R]), torch.einsum("ka,lb,abij->klij", L, R, kernel), atol=1e-5)


def test_copies_are_a_sparse_matrix():
    W, copies = torch.randn(2, 3), Copies(torch.tensor([0, 1, 2, 0]), torch.tensor([0.5, 1.0, 1.0, 0.5]))
    matrix = torch.tensor([[0.5, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0, 0]])
    assert torch.equal(along(W, [None, copies]), W @ matrix.T)
    mean = along(W, [None, Copies(torch.arange(3), averaged=2)])
    assert torch.allclose(mean[:, 3:], W.mean(1, keepdim=True).expand(2, 2))


def test_layers_are_taken_evenly_spaced_or_in_turn():
    assert interpolated(3, 6) == [0, 0, 1, 1, 2, 2]
    assert interpolated(4, 6) == [0, 0, 1, 2, 2, 3]
    assert interpolated(12, 8) == [0, 1, 3, 4, 6, 7, 9, 10]
    assert stacked(3, 6) == [0, 1, 2, 0, 1, 2]


def test_counterparts_have_another_number_and_the_same_name():
    small, large = [f"h.{i}.fc.0.w" for i in range(2)] + ["head"], [f"h.{i}.fc.0.w" for i in range(5)] + ["head"]
    assert counterparts(small, large) == {"h.0.fc.0.w": "h.0.fc.0.w", "h.1.fc.0.w": "h.2.fc.0.w", "head": "head"}
    assert counterparts(small, large, [4, 1])["h.0.fc.0.w"] == "h.4.fc.0.w"
    with pytest.raises(InputError, match="give one for each"):
        counterparts(small, large, [4, 1, 0])
    with pytest.raises(InputError, match="numbered 0 to 4"):
        counterparts(small, large, [5, 1])


def test_gaussian_maps_keep_the_variance():
    torch.manual_seed(0)
    W = torch.randn(256, 256) * 0.3
    ratios = [along(W, [gaussian(64, 256), gaussian(64, 256)]).var() / W.var() for _ in range(200)]
    assert 0.9 < float(torch.stack(ratios).mean()) < 1.1


# The method


@pytest.mark.parametrize("kind", ["mlp", "vit", "lm", "tied lm", "cnn"])
def test_cropped_to_its_own_size_the_student_is_the_teacher(kind):
    build = {
        "mlp": lambda seed: mlp(8, seed, depth=2),
        "vit": lambda seed: torch.manual_seed(seed) and ViTTiny(4, 2, dim=8, depth=2, heads=2, classes=3),
        "lm": lambda seed: language_model(seed, depth=2),
        "tied lm": lambda seed: torch.manual_seed(seed) and DecoderLM(11, 8, 2, 2, 16),
        "cnn": lambda seed: CNN(seed=seed),
    }[kind]
    teacher, student, method = build(1), build(2), WeightSqueezing(init="crop")
    text = kind.endswith("lm")
    data = ragged_tokens() if text else PICTURES
    run, batch = ready(method, student, teacher, data, task="language-model" if text else "classification")
    with torch.no_grad():
        expected = find_logits(call(teacher.eval(), batch.inputs))
        assert not torch.equal(find_logits(call(student.eval(), batch.inputs)), expected)
        assert torch.equal(method.run_composed(run, batch).logits, expected)


@pytest.mark.parametrize("tie", [True, False])
def test_the_composed_output_layer_is_the_one_that_losses_use(tie):
    torch.manual_seed(0)
    teacher, student = DecoderLM(11, 12, 1, 2, 16, tie=tie), DecoderLM(11, 8, 1, 2, 16, tie=tie)
    method = WeightSqueezing()
    run, batch = ready(method, student, teacher, ragged_tokens(), task="language-model")
    outputs = method.run_composed(run, batch)
    assert isinstance(outputs.raw, Projection)
    composed = method.compose(student)["embed_tokens.weight" if tie else "head.weight"]
    assert torch.equal(outputs.raw.weight, composed) and not torch.equal(composed, student.head.weight)
    method.loss({"data": batch}, run)["labels"].sum.backward()
    assert method.maps[key_of("embed_tokens.weight" if tie else "head.weight", 1)].grad.abs().sum() > 0


def test_gradients_of_the_maps_are_the_closed_forms():
    teacher, student, method = mlp(12, 1), mlp(5), WeightSqueezing()
    run, batch = ready(method, student, teacher)
    before = digest(teacher)
    composed = {k: v.detach().requires_grad_() for k, v in method.compose(student).items()}
    G = torch.autograd.grad(
        nn.functional.cross_entropy(torch.func.functional_call(student, composed, (batch.inputs,)), batch.labels),
        composed["linear1.weight"],
        allow_unused=True,
    )[0]
    (method.loss({"data": batch}, run)["labels"].mean).backward()
    W = teacher.linear1.weight.detach()
    L, Rt = (method.maps[key_of("linear1.weight", axis)] for axis in (0, 1))
    assert torch.allclose(L.grad, G @ (W @ Rt.T).T, atol=1e-6)
    assert torch.allclose(Rt.grad.T, (L @ W).T @ G, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters()) and digest(teacher) == before


def test_gates_mix_the_student_with_the_teachers_map():
    teacher, student, method = mlp(12, 1), mlp(5), WeightSqueezing(gated=True)
    ready(method, student, teacher)
    name = "linear1.weight"
    gate, mapped, own = method.gates["linear1/weight"], method.mapped(name).detach(), student.linear1.weight.detach()
    start = torch.full_like(own, -4.0)
    assert torch.equal(gate, start)
    with torch.no_grad():
        for value, expected in ((float("-inf"), own), (float("inf"), mapped)):
            gate.fill_(value)
            assert torch.equal(method.compose(student)[name], expected)
        gate.copy_(start)
    value = method.compose(student)[name]
    value.retain_grad()
    G = torch.randn_like(own)
    (value * G).sum().backward()
    s = torch.sigmoid(start)
    assert torch.allclose(gate.grad.sum(), (G * (mapped - own) * s * (1 - s)).sum(), atol=1e-6)
    assert torch.allclose(student.linear1.weight.grad, (1 - s) * G)


def test_gates_and_maps_and_the_student_are_trained_and_the_teacher_is_not():
    teacher, student, method = mlp(12, 1), mlp(5), WeightSqueezing(gated=True, lr_scale=3.0)
    before = digest(teacher), {k: v.clone() for k, v in student.state_dict().items()}
    t = trainer(method, student, teacher, PICTURES, schedule="constant", lr=0.1)
    model = t.fit()
    assert digest(teacher) == before[0]
    assert all(not torch.equal(v, before[1][k]) for k, v in student.state_dict().items())
    assert [g["lr"] for g in t._optimizers["maps"].param_groups] == [
        pytest.approx(0.3),
        pytest.approx(0.1),
    ]
    assert type(model) is MLP and [p.shape for p in model.parameters()] == [p.shape for p in student.parameters()]


@pytest.mark.parametrize("gated", [False, True])
def test_folded_it_answers_with_the_same_bits(gated):
    teacher, student, method = language_model(1, dim=12), language_model(dim=8), WeightSqueezing(gated=gated)
    t = trainer(method, student, teacher, ragged_tokens(), task="language-model")
    model = t.fit().eval()
    batch = as_data(ragged_tokens()).sample(12)
    with torch.no_grad():
        composed = call(student.eval(), batch.inputs, method.compose(student))
        assert torch.equal(call(model, batch.inputs), composed)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in student.parameters())


def test_norms_and_classes_start_as_a_crop():
    teacher, student, method = language_model(1, dim=12, depth=2), language_model(dim=8), WeightSqueezing()
    ready(method, student, teacher, ragged_tokens(), task="language-model")
    scale = method.compose(student)["blocks.0.norm1.weight"]
    assert torch.equal(scale, teacher.blocks[0].norm1.weight[:8])
    assert torch.equal(method.maps[key_of("head.weight", 0)], torch.eye(11))
    assert key_of("embed_tokens.weight", 0) not in method.maps


def test_a_crop_of_query_key_and_value_in_one_layer_is_one_of_each():
    teacher, student, method = language_model(1, dim=12), language_model(dim=8), WeightSqueezing(init="crop")
    ready(method, student, teacher, ragged_tokens(), task="language-model")
    found, theirs = (method.compose(student)["blocks.0.attn.qkv.weight"], teacher.blocks[0].attn.qkv.weight)
    assert torch.equal(found.view(3, 8, 8), theirs.view(3, 12, 12)[:, :8, :8])


def test_the_teachers_outputs_are_optional():
    teacher, student = mlp(12, 1), mlp(5)
    for alpha, terms in ((0.0, {"labels"}), (0.5, {"labels", "kd"}), (1.0, {"kd"})):
        method = WeightSqueezing(alpha=alpha)
        run, batch = ready(method, copy.deepcopy(student), teacher)
        assert method.loss({"data": batch}, run).keys() == terms


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_hugging_face_models_are_squeezed(kind):
    import transformers as hf

    torch.manual_seed(0)

    def build(width: int, layers: int) -> nn.Module:
        if kind == "bert":
            config = hf.BertConfig(
                vocab_size=11,
                hidden_size=width,
                intermediate_size=2 * width,
                num_labels=3,
                num_hidden_layers=layers,
                num_attention_heads=2,
                max_position_embeddings=16,
            )
            return hf.BertForSequenceClassification(config)
        if kind == "gpt2":
            return hf.GPT2LMHeadModel(
                hf.GPT2Config(vocab_size=11, n_embd=width, n_layer=layers, n_head=2, n_positions=16)
            )
        return hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=11,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                num_attention_heads=2,
                max_position_embeddings=16,
            )
        )

    data = ragged_tokens()
    if kind == "bert":
        data["labels"] = torch.arange(12) % 3
    result = transfer(
        WeightSqueezing(),
        build(16, 4),
        build(8, 2),
        data,
        task="classification" if kind == "bert" else "language-model",
        steps=2,
        batch_size=6,
    )
    assert "Singular values" in result.report.model_dump_json()
    assert type(result.model) is type(build(8, 2))


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "zero"}, "init is 'zero'"),
        ({"alpha": 2}, "alpha is 2"),
        ({"lr_scale": 0}, "lr_scale 0"),
        ({"temperature": 0}, "temperature 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        WeightSqueezing(**arguments)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="wider than the source's"):
        ready(WeightSqueezing(), mlp(12), mlp(5))
    ready(WeightSqueezing(allow_grow=True), mlp(12), mlp(5))
    with pytest.raises(InputError, match="half|float16"):
        ready(WeightSqueezing(), mlp(5), mlp(12).half())
    with pytest.raises(InputError, match="the name of one of the source's"):
        ready(WeightSqueezing(), nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), mlp(12))
    with pytest.raises(InputError, match="batch normalisation"):
        ready(WeightSqueezing(), CNN(width=2, norm=True), CNN(norm=True), images())
    tied, free = DecoderLM(11, 8, 1, 2, 16), DecoderLM(11, 12, 1, 2, 16, tie=False)
    with pytest.raises(InputError, match="one weight in the target and two in the source"):
        ready(WeightSqueezing(), tied, free, ragged_tokens(), task="language-model")
    with pytest.raises(InputError, match="needs labels"):
        trainer(WeightSqueezing(), mlp(5), mlp(12), PICTURES[0]).fit()


def test_other_heads_are_refused_until_layers_say_that_they_are_meant():
    teacher, student = DecoderLM(11, 12, 4, 3, 16), DecoderLM(11, 8, 2, 2, 16)
    with pytest.raises(InputError, match="2 attention heads, the source 3"):
        ready(WeightSqueezing(), student, teacher, ragged_tokens(), task="language-model")
    method = WeightSqueezing(layers=[3, 0])
    ready(method, student, teacher, ragged_tokens(), task="language-model")
    assert method._rules["blocks.0.mlp.fc1.weight"].source == "blocks.3.mlp.fc1.weight"

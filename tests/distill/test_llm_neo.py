"""LLM-Neo: what the sheet says must hold exactly, and adapters that the user brings."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Example, digest, language_model, ragged_tokens, trainer
from torch import Tensor, nn

from transfuse import Transfer, transfer
from transfuse.core.adapters import adapted, layers_to_adapt
from transfuse.core.batch import Batch, align_tokens
from transfuse.core.checkpoint import load_weights
from transfuse.core.errors import InputError, MissingExtraError
from transfuse.core.outputs import find_logits
from transfuse.core.run import Run
from transfuse.core.streams import as_data
from transfuse.core.trainer import Trainer
from transfuse.distill import KD, TAID, Labels, LLMNeo
from transfuse.models import DecoderLM

TEXT = align_tokens(Batch(inputs=ragged_tokens()))


def neo(method: LLMNeo, student: nn.Module | None = None, **training: Any) -> Trainer:
    student = language_model(depth=2) if student is None else student
    settings: dict[str, Any] = {"optimizer": "adam", "lr": 1e-2, **training}
    return trainer(method, student, language_model(1, dim=12), ragged_tokens(), task="language-model", **settings)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return find_logits(model.eval()(**TEXT.inputs))


def ready(method: Any, student: nn.Module) -> Run:
    models = {"target": student, "source": language_model(1, dim=12)}
    run = Run(models, {"data": as_data(ragged_tokens())}, task="language-model")
    run.set_modes(set())
    torch.manual_seed(3)
    method.setup(run, TEXT)
    return run


def objective(method: Any, run: Run) -> Tensor:
    return sum(t.weight * t.mean for t in method.losses({"data": TEXT}, run).values())


# Where it starts


def test_at_first_the_adapted_student_is_the_student_bit_for_bit():
    student, method = language_model(depth=2), LLMNeo(rank=4)
    run = ready(method, student)
    assert torch.equal(logits(run["adapted"]), logits(student))
    plain = KD(temperature=1.0, alpha=0.5)
    assert torch.equal(objective(method, run), objective(plain, ready(plain, student)))


def test_the_loss_is_linear_in_the_ratio_from_labels_to_teacher():
    value = {}
    for k in (0.0, 0.25, 1.0):
        method = LLMNeo(rank=4, kd_ratio=k)
        value[k] = objective(method, ready(method, language_model())).item()
    assert value[0.25] == pytest.approx(0.75 * value[0.0] + 0.25 * value[1.0], rel=1e-5)


def test_without_a_teacher_its_gradients_are_those_of_labels():
    method = LLMNeo(rank=4, kd_ratio=0.0)
    run = ready(method, language_model())
    params = list(method.additions.values())
    found = torch.autograd.grad(objective(method, run), params)
    entropy = Labels().loss(run("adapted", TEXT), run("source", TEXT), TEXT, run.clock)["labels"].mean
    assert all(
        torch.allclose(a, b, atol=1e-7) for a, b in zip(found, torch.autograd.grad(entropy, params), strict=True)
    )


def test_gradients_are_those_of_full_training_projected():
    """dL/dB = alpha / rank * G A^T, and dL/dA = 0, where B is 0."""
    student, method = language_model(depth=2), LLMNeo(rank=4, alpha=12.0)
    run = ready(method, student)
    full = KD(temperature=1.0, alpha=0.5)
    objective(full, ready(full, student)).backward()
    objective(method, run).backward()
    paths = layers_to_adapt(student, TEXT.inputs)
    assert len(paths) == 8 and "head" not in paths
    for path in paths:
        layer = run["adapted"].get_submodule(path)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        gradient = student.get_submodule(path).weight.grad
        assert a.grad.abs().max() == 0
        assert torch.allclose(b.grad, 12 / 4 * gradient @ a.T, atol=1e-6), path


# Where it ends


def test_base_weights_stay_and_what_is_deployed_answers_as_the_adapters_do():
    student = language_model(depth=2)
    before = copy.deepcopy(student)
    method = LLMNeo(rank=4)
    run = neo(method, student)
    model = run.fit()
    assert digest(student) == digest(before)
    adapted_logits = logits(run.run["adapted"])
    assert (logits(model) - adapted_logits).abs().max() < 1e-5
    assert (logits(before) - adapted_logits).abs().max() > 1e-2
    assert type(model) is DecoderLM and not any(hasattr(m, "lora_A") for m in model.modules())
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in before.named_parameters()]
    assert all(p.requires_grad for p in (*model.parameters(), *student.parameters()))


def test_an_update_has_at_most_the_rank_of_its_adapter():
    student, method = language_model(depth=1), LLMNeo(rank=2)
    model = neo(method, student, steps=20).fit()
    for path in layers_to_adapt(student, TEXT.inputs):
        change = (model.get_submodule(path).weight - student.get_submodule(path).weight).double()
        values = torch.linalg.svdvals(change)
        assert (values > 1e-5 * values[0]).sum() <= 2, path
        assert values[0] > 1e-3


def test_with_full_rank_any_update_can_be_represented():
    student, method = language_model(), LLMNeo(rank=8)
    run = ready(method, student)
    layer = run["adapted"].get_submodule("blocks.0.attn.proj")
    change = torch.randn(8, 8)
    left, values, right = torch.linalg.svd(change)
    with torch.no_grad():
        layer.lora_B["default"].weight.copy_(left * values)
        layer.lora_A["default"].weight.copy_(right / 2)  # alpha / rank is 2
    merged = method.deploy(student)
    assert torch.allclose(merged.blocks[0].attn.proj.weight - student.blocks[0].attn.proj.weight, change, atol=1e-5)


def test_only_adapters_are_trained_at_ten_times_the_rate():
    run = neo(LLMNeo(rank=2), schedule="constant", lr=1e-3)
    run.fit()
    (optimizer,) = run._optimizers.values()
    assert [g["lr"] for g in optimizer.param_groups] == [pytest.approx(1e-2)]
    trained = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    shapes = [(24, 8), (8, 8), (32, 8), (8, 32)] * 2
    assert trained == sum(2 * (i + o) for i, o in shapes)
    (panel,) = run.method.panels()
    assert panel["values"][0] == [trained, 8 * trained]
    assert panel["values"][1][0] == sum(p.numel() for p in language_model(depth=2).parameters())


def test_a_tied_head_is_never_adapted_nor_one_that_hugging_face_names():
    tied = DecoderLM(11, dim=8, depth=1, heads=2, context=16)
    paths = layers_to_adapt(tied, TEXT.inputs)
    assert paths == ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    lora = adapted(tied, TEXT.inputs, 2, 4)
    assert lora.model.head.weight is lora.model.embed_tokens.weight
    assert lora.model.head.weight.data_ptr() == tied.head.weight.data_ptr(), "no second copy of the weights"
    assert all(p.requires_grad for p in tied.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hugging_face_students_are_adapted_and_come_back_as_they_were(kind):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16)  # fmt: skip
        student = LlamaForCausalLM(config)
    else:
        student = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    run = neo(LLMNeo(rank=2), student)
    model = run.fit()
    assert type(model) is type(student) and model.state_dict().keys() == student.state_dict().keys()
    assert (logits(model) - logits(run.run["adapted"])).abs().max() < 1e-5
    assert (logits(model) - logits(student)).abs().max() > 1e-4


def test_saving_and_reading_the_report_and_the_weights(tmp_path):
    result = transfer(
        LLMNeo(rank=2), language_model(1), language_model(), ragged_tokens(), test=ragged_tokens(6, 1), steps=3,
        batch_size=6, out=tmp_path / "run",
    )  # fmt: skip
    fresh = language_model(5)
    load_weights(tmp_path / "run" / "model.safetensors", fresh)
    assert digest(fresh) == digest(result.model)
    assert "What was trained" in (tmp_path / "run" / "report.json").read_text()


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"rank": 0}, "rank is 0"), ({"alpha": 0}, "alpha is 0"), ({"kd_ratio": 1.5}, "kd_ratio is 1.5"),
     ({"temperature": 0}, "temperature is 0"), ({"lr_scale": -1}, "lr_scale -1")],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        LLMNeo(**arguments)


def test_students_that_cannot_be_adapted_are_refused():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(self.embed(input_ids))

    with pytest.raises(InputError, match="no linear layer beside its output layer"):
        neo(LLMNeo(rank=2), Bare()).fit()
    with pytest.raises(InputError, match="has adapters already: train them with KD"):
        neo(LLMNeo(rank=2), users_own()).fit()


def test_a_moving_average_of_weights_that_do_not_move_is_refused():
    with pytest.raises(InputError, match="ema is 0.9"):
        neo(LLMNeo(rank=2), ema=0.9).fit()


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"transfuse\[llm\]"):
        neo(LLMNeo(rank=2)).fit()


# Adapters that the user brings


def users_own() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(language_model(), LoraConfig(r=2, lora_alpha=4, target_modules=["qkv", "fc1"]))


@pytest.mark.parametrize("method", [KD(temperature=1.0, alpha=0.5), TAID(alpha=0.5), KD() + 0.5 * TAID()], ids=repr)
def test_any_method_teaches_adapters_that_the_user_put_in(method):
    student = users_own()
    before = {n: p.clone() for n, p in student.named_parameters()}
    run = trainer(copy.deepcopy(method), student, language_model(1), ragged_tokens(), task="language-model")
    run.fit()
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in student.named_parameters() if p.requires_grad}
    assert moved and all("lora_" in n for n in moved)


def test_the_users_adapters_are_resumed_bit_for_bit_and_saved(tmp_path):
    def one(folder: Path, **options: Any) -> Transfer:
        example = Example(KD(), users_own(), language_model(1), ragged_tokens(), ragged_tokens(6, 1))
        return Transfer(
            example.method, example.source, example.target, example.data, test=example.test, steps=5, batch_size=6,
            checkpoint_every=0.0, out=folder, **options,
        )  # fmt: skip

    class Killed(BaseException):
        pass

    def kill(arm: str, seed: int, trainer: Trainer, record: Any) -> None:
        if trainer.updates == 3:
            raise Killed

    whole = one(tmp_path / "whole").run()
    with pytest.raises(Killed):
        one(tmp_path / "cut", listener=kill).run()
    again = one(tmp_path / "cut").run(resume=True)
    assert digest(again.model) == digest(whole.model)
    fresh = users_own()
    load_weights(tmp_path / "cut" / "model.safetensors", fresh)
    assert digest(fresh) == digest(whole.model)
    merged = fresh.merge_and_unload()
    assert type(merged) is DecoderLM

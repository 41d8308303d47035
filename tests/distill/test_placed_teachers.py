"""Teachers in another precision, quantised, or kept elsewhere than in the memory of the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import digest, language_model, llama, ragged_tokens
from torch import Tensor, nn

from transfuse import Transfer, transfer
from transfuse.core.batch import Batch
from transfuse.core.output_layer import find_output_layer
from transfuse.core.placement import move, places_itself
from transfuse.core.run import Run
from transfuse.core.streams import as_data
from transfuse.distill import KD, RKD, TAID
from transfuse.losses import Projection

TEXT = Batch(inputs=ragged_tokens())
TRAINING = {"steps": 2, "batch_size": 6, "task": "language-model"}


class Int8Linear(nn.Module):
    """Weight-only quantisation: bytes and a scale per row, multiplied out when they are used."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def weight_only(model: nn.Module) -> nn.Module:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Int8Linear(layer))
    return model


def dynamic(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)


def asked(teacher: nn.Module, student: nn.Module | None = None) -> tuple[Run, Any, Any]:
    run = Run(
        {"target": student or language_model(), "source": teacher}, {"data": as_data(TEXT)}, task="language-model"
    )
    run.set_modes(set())
    return run, run("target", TEXT), run("source", TEXT, grad=False)


# Precision and quantisation


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [dynamic, weight_only], ids=["dynamic", "weight only"])
def test_a_quantised_teacher_gives_whole_logits_near_those_of_the_full_one(change):
    full, teacher = language_model(1, dim=12), change(language_model(1, dim=12))
    assert find_output_layer(teacher, TEXT.inputs) is None, "its layer is no plain one, so it applies it itself"
    _, student, outputs = asked(teacher)
    assert isinstance(student.raw, Projection) and isinstance(outputs.raw, Tensor)
    assert outputs.logits.dtype == torch.float32 and outputs.logits.device == student.logits.device
    with torch.no_grad():
        exact = full(**TEXT.inputs)
    assert (outputs.logits - exact).abs().max() < 0.05 * exact.abs().max()
    before = digest_of(teacher)
    method = KD(temperature=1.0, alpha=0.5)
    result = transfer(method, teacher, language_model(), ragged_tokens(), test=ragged_tokens(6, 1), **TRAINING)
    assert torch.isfinite(torch.tensor(result.arms[0].evaluations[0].metrics["kl"]))
    assert digest_of(teacher) == before


def digest_of(model: nn.Module) -> list[Any]:
    with torch.no_grad():
        return model(**TEXT.inputs).tolist()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", [KD(temperature=1.0, alpha=0.5), TAID(), RKD("blocks.0", "blocks.0")], ids=repr)
def test_a_teacher_of_another_precision_teaches_a_student_in_full_precision(kind, method):
    teacher = language_model(1, dim=12)
    plain = transfer(copy.deepcopy(method), teacher, language_model(), ragged_tokens(), **TRAINING).model
    model = transfer(copy.deepcopy(method), teacher.to(kind), language_model(), ragged_tokens(), **TRAINING).model
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(p.dtype == kind for p in teacher.parameters())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p - q).abs().max() < 5e-3


def test_a_teacher_that_is_a_function_may_answer_in_another_precision():
    teacher = language_model(1)

    def answer(**inputs: Tensor) -> Tensor:
        return teacher(**inputs).double()

    result = transfer(TAID(), answer, language_model(), ragged_tokens(), **TRAINING)
    assert all(p.isfinite().all() for p in result.model.parameters())


def test_a_teacher_that_is_only_read_costs_no_gradient_and_no_logits():
    """Its output layer is applied by the loss, where gradients are on: that must not make it learn."""
    teacher = language_model(1)
    assert teacher.head.weight.requires_grad
    _, _, outputs = asked(teacher)
    assert isinstance(outputs.raw, Projection) and not outputs.raw.weight.requires_grad
    assert outputs.raw.weight.data_ptr() == teacher.head.weight.data_ptr()
    assert not outputs.logits.requires_grad


# Kept elsewhere


def offloaded(where: str, folder: Any) -> nn.Module:
    from accelerate import cpu_offload, disk_offload

    model = llama()
    return cpu_offload(model, "cpu") if where == "memory" else disk_offload(model, str(folder), "cpu")


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_offloaded_teacher_teaches_as_one_in_memory_and_stays_where_it_is(where, tmp_path):
    teacher = offloaded(where, tmp_path)
    assert places_itself(teacher) and move(teacher, "cpu") is teacher
    _, student, outputs = asked(teacher)
    assert outputs.logits.device == student.logits.device
    assert torch.allclose(outputs.logits, asked(llama())[2].logits, atol=1e-5)
    models = []
    for source in (teacher, llama()):
        given = {"test": ragged_tokens(6, 1), **TRAINING}
        models.append(transfer(KD(temperature=1.0), source, language_model(), ragged_tokens(), **given).model)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)
    assert all(p.is_meta for p in teacher.parameters())


def test_an_offloaded_teacher_can_be_checked_before_and_resumed(tmp_path):
    teacher = offloaded("memory", tmp_path)
    given = {"test": ragged_tokens(6, 1), "out": tmp_path / "run", **TRAINING}
    Transfer(KD(), teacher, language_model(), ragged_tokens(), test=ragged_tokens(6, 1), **TRAINING).check()
    first = Transfer(KD(), teacher, language_model(), ragged_tokens(), **given).run()
    again = Transfer(KD(), teacher, language_model(), ragged_tokens(), **given).run(resume=True)
    assert digest(first.model) == digest(again.model)


def test_a_model_spread_over_devices_is_left_where_it_is():
    model = language_model()
    assert not places_itself(model)
    model.hf_device_map = {"embed_tokens": 0, "head": "cpu"}
    assert places_itself(model)

"""Subquadratic KD: what each stage compares, moves and reads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import digest, language_model, llama, ragged_tokens, trainer
from torch import nn

from transfuse.core.batch import Batch, align_tokens
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.streams import as_data
from transfuse.distill import Subquadratic
from transfuse.distill.subquadratic import SCHEDULES, cut
from transfuse.models import subquadratic_student


def models(mixer: str = "gla", copy_qkv: bool = True) -> tuple[nn.Module, nn.Module]:
    teacher = language_model(1, depth=2)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return subquadratic_student(teacher, mixer, copy_qkv), teacher


def losses_of(method: Subquadratic, target: nn.Module, source: nn.Module, letter: str) -> Any:
    """The terms of a stage on one batch, and the run."""
    made = trainer(method, target, source, ragged_tokens(24), task="language-model")
    batch = align_tokens(Batch(inputs=ragged_tokens(6)))
    method.setup(made.run, batch)
    stage = {"A": method.mixers, "B": method.hidden, "C": method.losses}[letter]
    return stage({"data": batch}, made.run)


@pytest.mark.parametrize("target", ["output", "matrix"])
def test_with_attention_as_the_mixer_and_copied_projections_nothing_is_left_to_learn(target):
    student, teacher = models("softmax")
    assert float(losses_of(Subquadratic(target=target), student, teacher, "A")["mixers"].mean) < 1e-10
    assert float(losses_of(Subquadratic(), student, teacher, "B")["hidden"].mean) < 1e-4
    assert abs(float(losses_of(Subquadratic(), student, teacher, "C")["teacher"].mean)) < 1e-6


@pytest.mark.parametrize(("letter", "target"), [("A", "output"), ("A", "matrix"), ("B", "output")])
def test_gradients_stay_in_their_blocks_and_parts(letter, target):
    student, teacher = models()
    terms = losses_of(Subquadratic(target=target), student, teacher, letter)
    next(iter(terms.values())).sum.backward()
    got = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert got
    assert all(n.startswith("blocks.") for n in got)
    if letter == "A":
        assert all(".norm1." in n or ".attn." in n for n in got)
    else:
        assert any(".mlp." in n for n in got) and any(".norm2." in n for n in got)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("letter", ["A", "B"])
def test_what_one_block_learns_does_not_depend_on_another(letter):
    found = []
    for scale in (1.0, 7.0):
        student, teacher = models()
        with torch.no_grad():
            student.blocks[0].attn.o_proj.weight.mul_(scale)
        next(iter(losses_of(Subquadratic(), student, teacher, letter).values())).sum.backward()
        found.append({n: p.grad for n, p in student.blocks[1].named_parameters() if p.grad is not None})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_hidden_states_are_compared_by_their_norm_not_squared_and_before_the_final_norm():
    student, teacher = models()
    value = float(losses_of(Subquadratic(), student, teacher, "B")["hidden"].mean)
    batch = align_tokens(Batch(inputs=ragged_tokens(6)))
    real = batch.inputs["attention_mask"].bool()
    mask = torch.ones(9, 9, dtype=torch.bool).tril() & real[:, None, None, :] | torch.eye(9, dtype=torch.bool)
    with torch.no_grad():
        positions = (real.cumsum(1) - 1).clamp(min=0)
        x = teacher.embed_tokens(batch.inputs["input_ids"]) + teacher.embed_positions(positions)
        total = torch.zeros(6, 9)
        for ours, theirs in zip(student.blocks, teacher.blocks, strict=True):
            total += (ours(x, mask) - theirs(x, mask)).square().sum(-1).sqrt()
            x = theirs(x, mask)
    assert value == pytest.approx(float(total[batch.mask].mean()), rel=1e-5)


def test_stage_c_is_cross_entropy_and_divergence_and_sequences_weigh_as_long_as_they_are():
    torch.manual_seed(0)
    tokens = torch.randint(11, (3, 7))
    batch = align_tokens(Batch(inputs=tokens))
    length = int(batch.mask[0].sum())
    s, t = torch.randn(2, 3, 7, 11).unbind(0)
    token = Subquadratic().loss(Outputs(s), Outputs(t), batch, Clock())
    sequence = Subquadratic(kl_reduction="sequence").loss(Outputs(s), Outputs(t), batch, Clock())
    p, q = t.log_softmax(-1), s.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)[batch.mask].mean()
    assert float(token["teacher"].mean) == pytest.approx(float(divergence), rel=1e-5)
    assert float(token["labels"].mean) == pytest.approx(
        float(nn.functional.cross_entropy(s[batch.mask], batch.labels[batch.mask])), rel=1e-5
    )
    assert float(sequence["teacher"].mean) == pytest.approx(length * float(token["teacher"].mean), rel=1e-5)
    assert float(sequence["labels"].mean) == float(token["labels"].mean)
    assert all(term.weight == 1 for term in token.values())


def test_schedules_are_those_of_the_paper():
    def at(letter: str, step: int) -> float:
        return SCHEDULES[letter](Clock(step=step, steps=100))

    assert [at("A", s) for s in (0, 9, 50, 89, 95)] == pytest.approx([0.1, 1, 1, 1, 0.5])
    assert [at("B", s) for s in (0, 19, 60, 99)] == pytest.approx([0.05, 1, 1, 1])
    assert [at("C", s) for s in (0, 9, 55)] == pytest.approx([0.1, 1, 0.5])


def test_stages_read_disjoint_parts_in_order_and_share_the_steps():
    student, teacher = models()
    seen: list[tuple[int, int, str]] = []
    method = Subquadratic(shares=(1, 2, 5))

    def listener(made: Any, record: Any) -> None:
        phase = made._stage.phases[0]
        ids = made._stage.streams["data"].ids
        seen.append((int(ids.min()), int(ids.max()), phase.name))
        seen_rates.append(made.run.optimizers[phase.name].param_groups[0]["initial_lr"])

    seen_rates: list[float] = []
    made = trainer(
        method, student, teacher, ragged_tokens(24), task="language-model", steps=16, batch_size=3, listener=listener
    )
    made.fit()
    assert made.updates == 16
    assert list(dict.fromkeys(seen)) == [(0, 2, "mixers"), (3, 8, "hidden"), (9, 23, "student")]
    assert [sum(s[2] == n for s in seen) for n in ("mixers", "hidden", "student")] == [2, 4, 10]
    assert list(dict.fromkeys(seen_rates)) == [2e-4, 2e-3, 3e-4]


def test_a_stage_alone_takes_all_steps_and_moves_only_its_parts():
    student, teacher = models()
    before = {n: p.clone() for n, p in student.named_parameters()}
    data = as_data(ragged_tokens(24))
    assert cut(data, 0.0, 1.0) is data
    made = trainer(Subquadratic("A"), student, teacher, ragged_tokens(24), task="language-model", steps=3)
    made.fit()
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(".norm1." in n or ".attn." in n for n in moved)
    assert made.updates == 3


def test_hugging_face_decoders_are_taught_too():
    pytest.importorskip("transformers")
    teacher = llama(hidden_size=8, num_attention_heads=2, num_key_value_heads=1)
    student = subquadratic_student(teacher, "ssd")
    names = {"blocks": "model.layers", "mixer": "self_attn", "norm": "input_layernorm"}
    method, before = Subquadratic(shares=(1, 1, 1), **names), digest(student)
    made = trainer(method, student, teacher, ragged_tokens(24), task="language-model", steps=6)
    made.fit()
    assert made.updates == 6
    assert digest(student) != before
    assert all(math.isfinite(float(p.sum())) for p in student.parameters())
    with pytest.raises(InputError, match="use target='output'"):
        losses_of(Subquadratic(target="matrix", **names), student, teacher, "A")
    with pytest.raises(InputError, match="name its own"):
        losses_of(Subquadratic(), student, teacher, "A")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": "CA"}, "letters of 'ABC'"),
        ({"target": "heads"}, "'output' or 'matrix'"),
        ({"kl_reduction": "mean"}, "'token' or 'sequence'"),
        ({"shares": (1, 2)}, "three positive"),
        ({"lr": (1, 0, 1)}, "three positive"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Subquadratic(**options)


def test_data_and_models_that_cannot_serve_are_refused():
    _, teacher = models()
    with pytest.raises(InputError, match="none"):
        cut(as_data(ragged_tokens(6)), 0.0, 0.01)
    with pytest.raises(InputError, match="not a loader"):
        cut(as_data([ragged_tokens(6)]), 0.0, 0.5)
    with pytest.raises(InputError, match="make them equal"):
        losses_of(Subquadratic(), language_model(depth=1), teacher, "A")

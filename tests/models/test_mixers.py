"""Subquadratic mixers: three forms that agree, causality, relations among them, and students made of teachers."""

from __future__ import annotations

import pytest
import torch
from helpers import language_model, llama, ragged_tokens

from transfuse.core.errors import InputError
from transfuse.models import DecoderLM, subquadratic_student
from transfuse.models.mixers import FLOOR, MIXERS, mix_chunks, mix_step, mixing_matrix, unroll

SUBQUADRATIC = [name for name in MIXERS if name != "softmax"]


def made(name: str, seed: int = 0):
    torch.manual_seed(seed)
    return MIXERS[name](dim=12, heads=3, bias=True)


def stream(tokens: int = 37) -> torch.Tensor:
    return torch.randn(2, tokens, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SUBQUADRATIC)
def test_chunks_the_matrix_and_the_recurrence_agree(name):
    mixer, x = made(name), stream()
    whole = mixer.parallel(x)
    assert torch.allclose(mixer(x), whole, atol=1e-4)
    state, found = mixer.start(2), []
    for token in x.unbind(1):
        out, state = mixer.step(token, state)
        found.append(out)
    assert torch.allclose(torch.stack(found, 1), whole, atol=1e-4)


@pytest.mark.parametrize("name", MIXERS)
def test_a_later_token_changes_nothing_earlier(name):
    mixer, x = made(name), stream()
    other = x.clone()
    other[:, 20] += 3
    assert torch.equal(mixer(x)[:, :16], mixer(other)[:, :16])
    assert torch.allclose(mixer(x)[:, :20], mixer(other)[:, :20], atol=1e-6)
    assert not torch.allclose(mixer(x)[:, 20:], mixer(other)[:, 20:], atol=1e-3)


@pytest.mark.parametrize("name", MIXERS)
def test_padding_on_either_side_is_not_seen(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = subquadratic_student(language_model(dim=8, depth=2), name).eval()
    tokens = torch.tensor([[3, 4, 5, 6]])
    alone = model(tokens)
    zeros = torch.zeros(1, 3, dtype=torch.long)
    left = model(torch.cat([zeros, tokens], 1), torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
    right = model(torch.cat([tokens, zeros], 1), torch.tensor([[1, 1, 1, 1, 0, 0, 0]]))
    assert torch.allclose(left[:, 3:], alone, atol=1e-4)
    assert torch.allclose(right[:, :4], alone, atol=1e-4)
    assert left.isfinite().all()


def test_the_matrix_is_what_the_recurrence_does_to_unit_vectors():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 2, 6, 4).unbind(0)
    for gates in (torch.rand(1, 2, 6, 1), torch.rand(1, 2, 6, 4)):
        matrix = mixing_matrix(query, key, gates.log())
        units, state, rows = torch.eye(6).expand(1, 2, 6, 6), torch.zeros(1, 2, 4, 6), []
        for t in range(6):
            out, state = mix_step(query[..., t, :], key[..., t, :], units[..., t, :], gates.log()[..., t, :], state)
            rows.append(out)
        assert torch.allclose(torch.stack(rows, -2), matrix, atol=1e-5)


def test_special_cases_are_one_another():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 2, 6, 4).unbind(0)
    linear = (query @ key.mT).tril()
    assert torch.allclose(mixing_matrix(query, key, torch.zeros(1, 2, 6, 4)), linear, atol=1e-5)  # GLA with a = 1
    assert torch.allclose(mixing_matrix(query, key, torch.zeros(1, 2, 6, 1)), linear, atol=1e-5)  # RetNet, gamma = 1
    gamma = torch.full((1, 2, 6, 1), 0.9)
    powers = torch.tensor([[0.9 ** (i - j) if j <= i else 0.0 for j in range(6)] for i in range(6)])
    assert torch.allclose(mixing_matrix(query, key, gamma.log()), (query @ key.mT) * powers, atol=1e-5)
    assert torch.allclose(
        mixing_matrix(query, key, gamma.log().expand(-1, -1, -1, 4)), (query @ key.mT) * powers, atol=1e-5
    )


def test_gates_that_close_stay_finite_and_have_finite_gradients():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 40, 4).unbind(0)
    log_a = torch.full((1, 2, 40, 4), 10 * FLOOR, requires_grad=True)
    out = mix_chunks(query, key, value, log_a, 16)
    out.sum().backward()
    assert out.isfinite().all()
    assert log_a.grad.isfinite().all()
    assert torch.allclose(out, (query * key).sum(-1, keepdim=True) * value, atol=1e-4)


def test_an_mlstm_with_large_gates_stays_finite():
    mixer, x = made("mlstm"), stream()
    with torch.no_grad():
        mixer.input_gate.bias.fill_(200.0)
    assert mixer(x).isfinite().all()


def test_a_student_with_attention_and_the_teachers_projections_is_the_teacher():
    teacher = language_model(dim=8, depth=2).eval()
    data = ragged_tokens(6)
    student = subquadratic_student(teacher, "softmax")
    real = data["attention_mask"].bool()
    assert torch.allclose(student(**data)[real], teacher(**data)[real], atol=1e-5)


def test_all_but_attention_is_copied_and_tied_weights_stay_one():
    teacher = DecoderLM(dim=8, depth=2, heads=2)
    torch.manual_seed(5)
    student = subquadratic_student(teacher, "retnet", copy_qkv=False)
    assert student.head.weight is student.embed_tokens.weight
    assert student.head.weight is not teacher.head.weight
    same = {n: p for n, p in teacher.named_parameters() if ".attn." not in n}
    assert all(torch.equal(dict(student.named_parameters())[n], p) for n, p in same.items())
    assert not torch.equal(student.blocks[0].attn.q_proj.weight, teacher.blocks[0].attn.qkv.weight[:8])
    copied = subquadratic_student(teacher, "retnet")
    assert torch.equal(copied.blocks[1].attn.v_proj.weight, teacher.blocks[1].attn.qkv.weight[16:])


def test_grouped_keys_are_repeated_in_place():
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import repeat_kv

    teacher = llama(head_dim=6, tie_word_embeddings=True)
    x = torch.randn(3, 5, 16)
    attention = teacher.model.layers[1].self_attn
    keys = repeat_kv(attention.k_proj(x).unflatten(-1, (2, 6)).transpose(1, 2), 2)
    for name in MIXERS:
        student = subquadratic_student(teacher, name).eval()
        mixer = student.model.layers[1].self_attn.mixer
        assert torch.allclose(mixer._split(mixer.k_proj(x)), keys, atol=1e-6)
        assert student.lm_head.weight is student.model.embed_tokens.weight
        tokens = torch.tensor([[1, 2, 3, 4, 5]])
        padded = student(torch.tensor([[0, 0, 1, 2, 3, 4, 5]]), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])).logits[:, 2:]
        assert torch.allclose(student(tokens).logits, padded, atol=1e-4)
        assert student.generate(tokens, max_new_tokens=2, do_sample=False).shape == (1, 7)
    with pytest.raises(InputError, match="no key-value cache"):
        student(tokens, use_cache=True)


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="multiple of heads"):
        MIXERS["gla"](dim=10, heads=3)
    with pytest.raises(InputError, match="pairs"):
        MIXERS["retnet"](dim=9, heads=3)
    with pytest.raises(InputError, match="unknown mixer 'lstm'"):
        subquadratic_student(language_model(), "lstm")
    with pytest.raises(InputError, match="neither `blocks`"):
        subquadratic_student(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="cannot be shared evenly"):
        unroll(torch.zeros(12, 4), 4, 4)
    with pytest.raises(InputError, match="later one"):
        made("gla")(stream(4), torch.ones(2, 1, 4, 4, dtype=torch.bool))

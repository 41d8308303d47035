"""Two language models are compared by the bytes of their tokens, and cut to what they share."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from helpers import first_gradients, language_model, ragged_tokens, trainer
from torch import nn

from transfuse import transfer
from transfuse.core.batch import Batch, align_tokens
from transfuse.core.errors import InputError, VocabularyError
from transfuse.core.outputs import Outputs
from transfuse.core.vocabulary import BYTES, common_classes, compare, cut, token_bytes
from transfuse.core.watch import TransferWarning
from transfuse.distill import KD, RKD, TAID
from transfuse.losses.scores import Projection, TopK
from transfuse.models import DecoderLM

TEXT = ["def größe(x): return x + 1", "the cat sat on the mat — again and again", "naïve façade 世界"] * 3
WORDS = [b"a", b"b", b"c", b"the", b" ", b"\n", b"x", b"y", b"z", b"<s>", b"</s>"]
"""As many as `helpers.language_model` has outputs."""


def byte_level(size: int = 300, texts: list[str] = TEXT) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def hugging_face(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


# Bytes of tokens


@pytest.mark.parametrize("wrap", [lambda t: t, hugging_face], ids=["tokenizers", "transformers"])
def test_byte_level_tokens_are_the_bytes_of_the_text(wrap):
    tokenizer = byte_level()
    tokens = token_bytes(wrap(tokenizer))
    assert len(tokens) == tokenizer.get_vocab_size() and None not in tokens
    for text in TEXT[:3]:
        assert b"".join(tokens[i] for i in tokenizer.encode(text).ids) == text.encode()
    assert tokens[0] == b"<|end|>"
    assert set(BYTES) <= set(tokens)


def test_pieces_mark_spaces_and_single_bytes():
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = [("<unk>", 0.0), ("▁the", -1.0), ("▁", -2.0), ("ü", -3.0), ("<0xE4>", -4.0), ("<0x0A>", -5.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    assert token_bytes(tokenizer) == [b"<unk>", b" the", b" ", "ü".encode(), b"\xe4", b"\n"]


def test_lists_mappings_and_bytes():
    assert token_bytes(["a", b"b", None]) == [b"a", b"b", None]
    assert token_bytes({"a": 0, "ü": 3}) == [b"a", None, None, "ü".encode()]
    assert token_bytes(BYTES)[65] == b"A"
    with pytest.raises(InputError, match="cannot be read from a int"):
        token_bytes(3)


# Relations


def test_identical_padded_and_different():
    ids = byte_level()
    size = ids.get_vocab_size()
    assert compare(ids, hugging_face(ids), size, size).kind == "identical"
    padded = compare(ids, ids, size + 50, size + 7)
    assert (padded.kind, padded.common) == ("padded", size + 7)
    swapped = list(token_bytes(ids))
    swapped[2], swapped[9] = swapped[9], swapped[2]
    different = compare(swapped, ids, size, size)
    assert (different.kind, different.common) == ("different", 2)
    assert different.differing == ((2, swapped[2], swapped[9]), (9, swapped[9], swapped[2]))


def test_an_id_that_only_one_side_knows_is_a_difference():
    assert compare(WORDS, WORDS[:-1], 11, 11).differing == ((10, b"</s>", None),)


def test_five_differences_are_shown_of_many():
    assert len(compare(BYTES, BYTES[::-1], 256, 256).differing) == 5


def test_a_tokenizer_with_more_ids_than_outputs_is_refused():
    with pytest.raises(VocabularyError, match="the tokenizer of the source has ids up to 10, its model 9 outputs"):
        compare(WORDS, WORDS, 11, 9)


# Cutting


def test_a_projection_is_cut_as_a_view():
    layer = nn.Linear(4, 9)
    raw = Projection(torch.randn(2, 3, 4), layer.weight, layer.bias)
    found = cut(Outputs(raw), 6).raw
    assert found.weight.data_ptr() == layer.weight.data_ptr() and found.bias.data_ptr() == layer.bias.data_ptr()
    assert torch.allclose(found.dense(), raw.dense()[..., :6], atol=1e-6)
    assert cut(Outputs(raw), 9).raw is raw


def test_what_was_kept_of_a_distribution_is_not_cut():
    kept = Outputs(TopK(torch.zeros(1, 2, 1, dtype=torch.long), torch.zeros(1, 2, 1), 9))
    assert cut(kept, 6) is kept


# In a transfer


def padded(rows: int, seed: int = 1, shift: float = 5.0) -> DecoderLM:
    """The teacher with rows in its head that no token has, and that would take much of the probability."""
    model = language_model(seed)
    head = nn.Linear(8, 11 + rows, bias=False)
    with torch.no_grad():
        head.weight[:11] = model.head.weight
        head.weight[11:] = shift
    model.head = head
    return model


def told(model: nn.Module, tokenizer: Any = WORDS) -> nn.Module:
    model.tokenizer = tokenizer
    return model


def gradients(method: Any, student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    return first_gradients(method, student, teacher, ragged_tokens(), task="language-model")


@pytest.mark.parametrize("method", [KD(alpha=0.5), TAID(), KD() + 0.5 * TAID()], ids=repr)
def test_a_padded_teacher_teaches_exactly_as_without_its_padding(method):
    plain = gradients(copy.deepcopy(method), language_model(), language_model(1))
    cut_down = gradients(copy.deepcopy(method), told(language_model()), told(padded(5)))
    assert plain.keys() == cut_down.keys()
    assert all(torch.allclose(plain[n], cut_down[n], atol=1e-6) for n in plain)


def test_a_padded_student_learns_as_without_its_padding():
    wide = padded(3, seed=0)
    plain = gradients(KD(alpha=0.5), language_model(), language_model(1))
    found = gradients(KD(alpha=0.5), told(wide), told(language_model(1)))
    head = found.pop("DecoderLM.head.weight")
    assert torch.allclose(head[:11], plain.pop("DecoderLM.head.weight"), atol=1e-6)
    assert head[11:].abs().max() == 0
    assert all(torch.allclose(plain[n], found[n], atol=1e-6) for n in plain)


def test_permuted_ids_are_refused_where_the_bytes_are_known():
    order = [*range(1, 11), 0]
    teacher = told(language_model(1), [WORDS[i] for i in order])
    for method in (KD(), RKD("blocks.0", "blocks.0")):
        with pytest.raises(VocabularyError, match=r"0: b'a' in the target, b'b' in the source.*ByteSpanKD.*SeqKD"):
            gradients(method, told(language_model()), teacher)


def test_nothing_can_be_known_of_models_that_say_nothing():
    gradients(KD(), language_model(), told(language_model(1)))
    assert common_classes(language_model(), language_model(1), 11, 11) == 11
    with pytest.raises(VocabularyError, match=r"set `model.tokenizer` on both.*SortedLogitsKD"):
        gradients(KD(), language_model(), padded(5))


def test_labels_beyond_the_shared_tokens_are_refused():
    data = {k: v.clone() for k, v in ragged_tokens().items()}
    data["labels"] = data["input_ids"].clone()
    data["labels"][3, 1] = 12
    with pytest.raises(VocabularyError, match="the label 12 is none of the 11 tokens"):
        trainer(KD(), told(padded(3, 0)), told(language_model(1)), data, task="language-model", batch_size=12).fit()


def test_a_whole_transfer_with_a_padded_teacher():
    held_out = ragged_tokens(6, seed=5)
    result = transfer(
        KD(), told(padded(5)), told(language_model()), ragged_tokens(), test=held_out, steps=2, lr=1e-2, batch_size=6
    )
    assert {"nll", "kl", "agreement"} <= result.arms[0].evaluations[0].metrics.keys()
    assert type(result.model) is DecoderLM


def test_users_of_hugging_face_models_are_told_once_that_ids_were_not_compared():
    student, teacher = language_model(), language_model(1)
    for model in (student, teacher):
        model.config = type("Config", (), {"vocab_size": 11})()
    with pytest.warns(TransferWarning, match=r"set `model.tokenizer` on both") as caught:
        gradients(KD(), student, teacher)
    assert len([w for w in caught if "tokenizer" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", TransferWarning)
        gradients(KD(), told(student), told(teacher))


def test_a_batch_may_have_inputs_of_its_own_for_the_source():
    batch = align_tokens(Batch(inputs=ragged_tokens(3), source=ragged_tokens(3, seed=1)))
    assert batch.for_source().inputs is batch["source"]
    assert torch.equal(batch.slice(1, 2)["source"]["input_ids"], batch["source"]["input_ids"][1:2])
    plain = Batch(inputs=torch.ones(2, 2))
    assert plain.for_source() is plain

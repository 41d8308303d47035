"""ByteSpanKD: chunks of the same bytes, and the divergence between their likelihoods."""

from __future__ import annotations

import math

import pytest
import torch
from distill.examples_adapters import TEXTS, merging, reader
from helpers import first_gradients, trainer

from transfuse import transfer
from transfuse.core.batch import Batch, align_tokens
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.vocabulary import BYTES, token_bytes
from transfuse.datasets import paired_tokens
from transfuse.distill import KD, ByteSpanKD, SortedLogitsKD
from transfuse.distill.byte_span import spans
from transfuse.losses.alignment import align_spans, binary_kl


def paired(texts: list[str] = TEXTS, context: int = 16) -> Batch:
    return align_tokens(Batch(paired_tokens(texts, BYTES, merging(), context)))


# Two readings of a text


def test_both_readings_end_after_the_same_byte():
    data = paired()
    for row, text in enumerate(TEXTS):
        assert data["ends"][row, -1] == data["source_ends"][row, -1] == len(text.encode())
        ids = data["source"]["input_ids"][row][data["source"]["attention_mask"][row].bool()]
        assert b"".join(token_bytes(merging())[i] for i in ids[1:]) == text.encode()
        assert int(data["source_ends"][row, 0]) == 0, "the token before the text has no bytes"
        assert data["inputs"]["input_ids"][row, : len(text.encode())].tolist() == list(text.encode())


def test_a_tokenizer_that_changes_the_text_is_refused():
    from tokenizers import Tokenizer, models, normalizers

    lower = Tokenizer(models.WordLevel({"cat": 0, "<unk>": 1}, unk_token="<unk>"))
    lower.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match=r"text 0 is b'CAT', its tokens are b'cat'"):
        paired_tokens(["CAT"], BYTES, lower, 8)


def test_the_space_that_sentencepiece_puts_first_is_no_byte_of_the_text():
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁the", -1.0), ("▁cat", -1.0), ("▁", -9.0)], unk_id=0))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    assert paired_tokens(["the cat"], BYTES, pieces, 8)["source_ends"].tolist() == [[3, 7]]


# Chunks


def loop(ours: list[int], theirs: list[int]) -> list[tuple[list[int], list[int]]]:
    """Chunks as lists of token numbers."""
    found, begin = [], 0
    for end in sorted(set(ours) & set(theirs) - {0}):
        inside = [[i for i, e in enumerate(side) if begin < e <= end and (side[i - 1] if i else 0) < e] for side in
                  (ours, theirs)]  # fmt: skip
        found.append((inside[0], inside[1]))
        begin = end
    return found


def test_chunks_agree_with_a_loop_over_many_random_cuts():
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        rows = []
        for _ in range(2):
            widths = torch.randint(0, 4, (3, 7), generator=draw)
            rows.append(widths.cumsum(1))
        everything = torch.ones(3, 7, dtype=torch.bool)
        found = align_spans(rows[0], everything, rows[1], everything)
        for b in range(3):
            chunks = loop(rows[0][b].tolist(), rows[1][b].tolist())
            assert int(found.valid[b].sum()) == len(chunks)
            for number, (ours, theirs) in enumerate(chunks):
                assert (found.student[b] == number).nonzero().flatten().tolist() == ours
                assert (found.teacher[b] == number).nonzero().flatten().tolist() == theirs


def test_a_chunk_with_an_unscored_token_is_left_out():
    ends = torch.tensor([[1, 2, 4, 5]])
    known = torch.tensor([[False, True, True, True]])
    found = align_spans(ends, known, torch.tensor([[0, 2, 4, 5]]), torch.tensor([[False, True, True, False]]))
    assert found.valid.tolist() == [[False, True, False]], "no first token's likelihood; the last is not scored"


def test_likelihoods_multiply_over_the_tokens_of_a_chunk():
    """A teacher that reads bytes, and a student that reads pairs: the chunk is the pair."""
    pair = torch.log_softmax(torch.randn(1, 3, 5), -1)
    single = torch.log_softmax(torch.randn(1, 6, 7), -1)
    pairs, bytes_ = torch.tensor([[1, 4, 2]]), torch.tensor([[0, 3, 5, 6, 1, 2]])
    batch = align_tokens(
        Batch(
            inputs={"input_ids": pairs, "attention_mask": torch.ones_like(pairs)},
            source={"input_ids": bytes_, "attention_mask": torch.ones_like(bytes_)},
            ends=torch.tensor([[2, 4, 6]]),
            source_ends=torch.tensor([[1, 2, 3, 4, 5, 6]]),
        )
    )
    method = ByteSpanKD(temperature=20.0)
    term = method.loss(Outputs(pair), Outputs(single), batch, Clock())["spans"]
    expected = 0.0
    for i in (1, 2):
        q = math.exp(float(pair[0, i - 1, pairs[0, i]])) ** (1 / 20)
        p = math.exp(sum(float(single[0, j - 1, bytes_[0, j]]) for j in (2 * i, 2 * i + 1))) ** (1 / 20)
        expected += 20 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert float(term.count) == 2 and spans(batch).valid.tolist() == [[False, True, True]]
    assert term.sum.item() == pytest.approx(expected, rel=1e-3)


# The divergence


@pytest.mark.parametrize("temperature", [1.0, 10.0, 100.0])
def test_the_divergence_is_zero_where_both_agree_and_its_gradient_points_there(temperature):
    p = torch.tensor([-0.01, -1.0, -30.0, -200.0])
    assert binary_kl(p, p, temperature).abs().max() < 1e-5
    q = (p - 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(binary_kl(q, p, temperature).sum(), q)
    assert (gradient <= 0).all() and gradient.isfinite().all(), "more likelihood lowers the loss"


def test_for_a_high_temperature_the_size_no_longer_depends_on_it():
    p, q = torch.tensor([-3.0, -7.0]).double(), torch.tensor([-4.0, -2.0]).double()
    limit = q.neg() - p.neg() + p.neg() * (p / q).log()
    assert torch.allclose(binary_kl(q, p, 1e4), limit, rtol=1e-2)


@pytest.mark.parametrize("value", [0.0, -1e-9, -1e4])
def test_certain_and_impossible_chunks_have_finite_values_and_gradients(value):
    q = torch.tensor([value, value], requires_grad=True)
    found = binary_kl(q, torch.tensor([0.0, -5000.0]))
    found.sum().backward()
    assert found.isfinite().all() and q.grad.isfinite().all()


# In training


def test_a_student_of_bytes_learns_the_likelihoods_of_a_teacher_of_pairs():
    student, teacher, data = reader(256, 0), reader(merging().get_vocab_size(), 1), paired_tokens(
        TEXTS, BYTES, merging(), 16
    )  # fmt: skip
    seen: list[float] = []

    def listen(trainer: object, record: object) -> None:
        seen.append(float(trainer.run.values["spans"]))  # type: ignore[attr-defined]

    trainer(
        ByteSpanKD(), student, teacher, data, task="language-model", steps=60, batch_size=8, optimizer="adam", lr=1e-2,
        listener=listen,
    ).fit()  # fmt: skip
    assert seen[-1] < 0.3 * seen[0]


def test_cutting_a_batch_changes_nothing():
    data = paired_tokens(TEXTS, BYTES, merging(), 16)
    whole, parts = (
        first_gradients(ByteSpanKD(alpha=0.5), reader(256, 0), reader(merging().get_vocab_size(), 1), data,
                        task="language-model", micro_batch=m, batch_size=8)
        for m in (None, 3)
    )  # fmt: skip
    assert all(torch.allclose(whole[n], parts[n], atol=1e-6) for n in whole)


def test_a_transfer_measures_the_student_alone_for_positions_do_not_compare():
    data = paired_tokens(TEXTS, BYTES, merging(), 16)
    result = transfer(ByteSpanKD(), reader(merging().get_vocab_size(), 1), reader(256, 0), data, test=data, steps=2,
                      batch_size=4)  # fmt: skip
    metrics = result.arms[0].evaluations[0].metrics
    assert {"nll", "bits_per_byte"} <= metrics.keys() and "agreement" not in metrics


def test_methods_for_different_tokens_add_up_and_others_are_refused():
    data, teacher = paired_tokens(TEXTS, BYTES, merging(), 16), reader(merging().get_vocab_size(), 1)
    found = {
        repr(method): first_gradients(method, reader(256, 0), teacher, data, task="language-model", batch_size=8)
        for method in (ByteSpanKD(), SortedLogitsKD(), 0.3 * ByteSpanKD() + 2 * SortedLogitsKD())
    }
    a, b, both = found.values()
    assert all(torch.allclose(0.3 * a[n] + 2 * b[n], both[n], atol=1e-5) for n in both)
    for method in (KD(), ByteSpanKD() + KD()):
        with pytest.raises(InputError, match="KD compares target and source position by position"):
            trainer(method, reader(256, 0), teacher, data, task="language-model").fit()


def test_other_tasks_and_batches_without_positions_are_refused():
    data = paired_tokens(TEXTS, BYTES, merging(), 16)
    teacher = reader(merging().get_vocab_size(), 1)
    without = {k: v for k, v in data.items() if not k.endswith("ends")}
    with pytest.raises(InputError, match="needs the byte after each token"):
        trainer(ByteSpanKD(), reader(256, 0), teacher, without, task="language-model").fit()
    with pytest.raises(InputError, match="pass task='language-model'"):
        trainer(ByteSpanKD(), reader(256, 0), teacher, data).fit()
    with pytest.raises(InputError, match="temperature is 0"):
        ByteSpanKD(temperature=0)
    with pytest.raises(InputError, match="alpha is 2"):
        ByteSpanKD(alpha=2)


def test_the_error_for_different_tokens_names_the_methods_that_work():
    def told(model: torch.nn.Module, tokenizer: object) -> torch.nn.Module:
        model.tokenizer = tokenizer
        return model

    student, teacher = told(reader(256, 0), BYTES), told(reader(256, 1), BYTES[::-1])
    with pytest.raises(InputError, match=r"ByteSpanKD.*SortedLogitsKD.*SeqKD"):
        trainer(KD(), student, teacher, {"input_ids": torch.tensor([[1, 2]])}, task="language-model").fit()

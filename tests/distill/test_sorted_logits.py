"""SortedLogitsKD: the distance between sorted probabilities, position by position."""

from __future__ import annotations

import pytest
import torch
from distill.examples_adapters import TEXTS, merging, reader
from helpers import first_gradients

from transfuse.core.batch import Batch, align_tokens
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.vocabulary import BYTES
from transfuse.datasets import paired_tokens
from transfuse.distill import SortedLogitsKD
from transfuse.losses.alignment import sorted_distance


def test_the_distance_is_that_of_the_paper_with_the_smaller_vocabulary_filled_up():
    student, teacher = torch.randn(5, 4), torch.randn(5, 7)
    for i in range(5):
        ours = sorted(student[i].softmax(-1).tolist(), reverse=True) + [0.0] * 3
        theirs = sorted(teacher[i].softmax(-1).tolist(), reverse=True)
        expected = sum(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        assert sorted_distance(student, teacher)[i].item() == pytest.approx(expected, rel=1e-5)


def test_the_distance_does_not_see_which_token_is_likely():
    logits = torch.randn(3, 6)
    assert sorted_distance(logits, logits[:, torch.randperm(6)]).abs().max() < 1e-6
    assert (sorted_distance(logits, 2 * logits) > 1e-3).all()


def test_the_weight_is_that_of_the_paper_and_labels_always_take_part():
    assert SortedLogitsKD().weight == 1.5
    with pytest.raises(InputError, match="weight is 0"):
        SortedLogitsKD(weight=0)


def test_the_longer_text_is_cut_to_the_shorter_one():
    data = align_tokens(Batch(paired_tokens(TEXTS, BYTES, merging(), 16)))
    student, teacher = reader(256, 0), reader(merging().get_vocab_size(), 1)
    ours, theirs = student(**data.inputs).detach(), teacher(**data["source"])
    term = SortedLogitsKD().loss(Outputs(ours), Outputs(theirs), data, Clock())["sorted"]
    total, count = 0.0, 0
    for row in range(len(TEXTS)):
        ends = [int(data.inputs["attention_mask"][row].sum()), int(data["source"]["attention_mask"][row].sum())]
        for k in range(min(ends) - 1):
            total += float(sorted_distance(ours[row, k], theirs[row, k]))
            count += 1
    assert float(term.count) == count
    assert term.sum.item() == pytest.approx(total, rel=1e-5)
    assert term.weight == 1.5


def test_cutting_a_batch_changes_nothing():
    data = paired_tokens(TEXTS, BYTES, merging(), 16)
    whole, parts = (
        first_gradients(
            SortedLogitsKD(), reader(256, 0), reader(merging().get_vocab_size(), 1), data, task="language-model",
            micro_batch=m, batch_size=8,
        )
        for m in (None, 3)
    )  # fmt: skip
    assert all(torch.allclose(whole[n], parts[n], atol=1e-6) for n in whole)

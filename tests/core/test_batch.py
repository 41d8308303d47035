from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch

from transfuse.core.batch import Batch, align_tokens, line_up
from transfuse.core.errors import InputError

X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, -100])


@dataclass
class Sample:
    inputs: torch.Tensor
    labels: torch.Tensor


@pytest.mark.parametrize(
    "item",
    [
        (X, Y),
        [X, Y],
        {"inputs": X, "labels": Y},
        Sample(X, Y),
        Batch(inputs=X, labels=Y),
    ],
    ids=["tuple", "list", "mapping", "dataclass", "batch"],
)
def test_reads_inputs_and_labels_from(item):
    batch = Batch.of(item)
    assert torch.equal(batch.inputs, X)
    assert torch.equal(batch.labels, Y)
    assert batch.size == 3


@pytest.mark.parametrize("item", [X, (X,), [X], {"inputs": X}], ids=["tensor", "tuple", "list", "mapping"])
def test_reads_unlabelled_inputs_from(item):
    batch = Batch.of(item)
    assert torch.equal(batch.inputs, X)
    assert batch.labels is None


@pytest.mark.parametrize("name", ["labels", "label", "target", "targets", "y"])
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_takes_labels_and_well_known_keys_out_of_a_hugging_face_mapping(kind, name):
    ids = torch.ones(3, 4, dtype=torch.long)
    item = kind({name: Y, "input_ids": ids, "attention_mask": ids, "index": torch.arange(3), "text": ["a", "b", "c"]})
    batch = Batch.of(item)
    assert list(batch.inputs) == ["input_ids", "attention_mask"]
    assert torch.equal(batch.labels, Y)
    assert torch.equal(batch.index, torch.arange(3))


def test_reads_keyword_inputs_with_labels_beside_them():
    batch = Batch.of(({"image": X}, Y))
    assert list(batch.inputs) == ["image"]
    assert torch.equal(batch.labels, Y)


@pytest.mark.parametrize("item", [7, "text", (X, Y, Y), [], None])
def test_refuses_what_it_cannot_read_and_says_what_works(item):
    with pytest.raises(InputError, match="expected a tensor, \\(inputs, labels\\), or a mapping"):
        Batch.of(item)


def test_refuses_a_mapping_without_tensors():
    with pytest.raises(InputError, match="text holds no input tensor"):
        Batch.of({"text": ["a"]})


def test_absent_well_known_keys_are_none_and_others_raise():
    batch = Batch(inputs=X)
    assert batch.labels is batch.mask is batch.index is batch.domain is batch.task is None
    with pytest.raises(AttributeError, match="no 'weight'; it has: inputs"):
        batch.weight  # noqa: B018


def test_size_is_that_of_the_inputs_whatever_comes_first():
    assert Batch(prior=torch.zeros(10), inputs={"image": X}).size == 3
    assert Batch().size == 0


def test_slice_cuts_nested_tensors_alike():
    part = Batch(inputs={"image": X}, labels=Y, scale=torch.tensor(2.0), name="kept").slice(1, 3)
    assert torch.equal(part.inputs["image"], X[1:3])
    assert torch.equal(part.labels, Y[1:3])
    assert part.scale == 2
    assert part.name == "kept"


# Token alignment: the one shift. Position t is scored on token t + 1.

EOS = 9
TEXT = [5, 6, EOS]


def padded(left: int, right: int) -> Batch:
    ids = torch.tensor([[EOS] * left + TEXT + [EOS] * right])  # the padding token is the end token
    mask = torch.tensor([[0] * left + [1] * len(TEXT) + [0] * right])
    return Batch(inputs={"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 2), (2, 0), (1, 3)])
def test_padding_on_either_side_scores_the_same_tokens(left, right):
    aligned = align_tokens(padded(left, right))
    real = slice(left, left + len(TEXT))
    assert aligned.labels[0, real].tolist() == [6, EOS, -100]
    assert aligned.mask[0, real].tolist() == [True, True, False]
    assert int(aligned.mask.sum()) == 2


def test_the_end_token_is_scored_although_padding_has_the_same_id():
    aligned = align_tokens(padded(0, 2))
    assert EOS in aligned.labels[aligned.mask].tolist()
    assert int((aligned.labels == EOS).sum()) == 1


def test_without_a_mask_every_token_but_the_first_is_scored():
    aligned = align_tokens(Batch(inputs=torch.tensor([[1, 2, 3]])))
    assert aligned.labels.tolist() == [[2, 3, -100]]
    assert aligned.mask.tolist() == [[True, True, False]]


def test_a_one_token_answer_is_scored_at_the_token_before_it():
    tokens = torch.tensor([[1, 2, 3, 7]])
    aligned = align_tokens(Batch(inputs=tokens, labels=torch.tensor([[-100, -100, -100, 7]])))
    assert aligned.mask.tolist() == [[False, False, True, False]]
    assert aligned.labels[0, 2] == 7


def test_a_mask_of_the_data_says_which_tokens_are_predicted():
    tokens = torch.tensor([[1, 2, 3, 7]])
    aligned = align_tokens(Batch(inputs=tokens, mask=torch.tensor([[0, 0, 1, 1]])))
    assert aligned.labels.tolist() == [[-100, 3, 7, -100]]


def test_aligning_changes_no_tensor_of_the_data():
    batch = padded(1, 1)
    before = batch.inputs["input_ids"].clone()
    align_tokens(batch)
    assert torch.equal(batch.inputs["input_ids"], before)
    assert batch.labels is None


def test_a_language_model_needs_token_ids():
    with pytest.raises(InputError, match=r"integer token ids of shape \(batch, tokens\)"):
        align_tokens(Batch(inputs=X))


def test_tasks_whose_labels_line_up_already_get_only_a_mask():
    labelled = Batch(inputs=X, labels=Y)
    assert line_up(labelled, "token-classification").mask.tolist() == [True, True, False]
    assert line_up(labelled, "classification").mask is None
    assert line_up(Batch(inputs=X), "segmentation").mask is None
    assert line_up(padded(0, 0), "language-model").labels is not None

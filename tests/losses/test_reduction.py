from __future__ import annotations

import pytest
import torch

from transfuse.losses import IGNORE, Term, classes_last, mask_from_lengths, next_token


def test_a_token_counts_the_same_in_short_and_long_answers() -> None:
    values = torch.tensor([[1.0, 9.0, 9.0], [3.0, 3.0, 3.0]])
    assert Term.of(values, mask_from_lengths(torch.tensor([1, 3]), 3)).mean == 2.5  # a mean of means gives 2.0


def test_sum_over_count_does_not_depend_on_how_the_batch_is_cut() -> None:
    values, mask = torch.rand(12, 5), mask_from_lengths(torch.randint(1, 6, (12,)), 5)
    whole = Term.of(values, mask)
    for size in (1, 3, 4):
        parts = [Term.of(v, m) for v, m in zip(values.split(size), mask.split(size), strict=True)]
        total = torch.stack([p.sum for p in parts]).sum() / torch.stack([torch.as_tensor(p.count) for p in parts]).sum()
        torch.testing.assert_close(total, whole.mean)


def test_weight_leaves_the_raw_sum_alone() -> None:
    term = 0.5 * (0.5 * Term.of(torch.tensor([1.0, 2.0])))
    assert term.sum == 3.0
    assert term.weight == 0.25


@pytest.mark.parametrize(("shape", "unit"), [((4,), "sample"), ((4, 2), "token"), ((4, 2, 2), "token")])
def test_unit_follows_from_the_dimensions(shape: tuple[int, ...], unit: str) -> None:
    term = Term.of(torch.ones(shape))
    assert term.unit == unit
    assert term.count == torch.ones(shape).numel()


def test_unit_can_be_named() -> None:
    assert Term.of(torch.ones(2), unit="labelled").unit == "labelled"


def test_a_masked_value_may_be_infinite_or_nan_without_harm() -> None:
    values = torch.tensor([1.0, torch.inf, torch.nan], requires_grad=True)
    term = Term.of(values, torch.tensor([True, False, False]))
    term.sum.backward()
    assert term.sum == 1.0
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 0.0, 0.0]


def test_refuses_a_scalar_and_says_how_to_wrap_one() -> None:
    with pytest.raises(ValueError, match=r"Term\(value\)"):
        Term.of(torch.tensor(1.0))


def test_refuses_a_mask_of_another_shape_naming_both() -> None:
    with pytest.raises(ValueError, match=r"\(2,\).*\(2, 3\)"):
        Term.of(torch.ones(2, 3), torch.ones(2, dtype=torch.bool))


def test_next_token_labels_each_position_with_its_successor() -> None:
    assert next_token(torch.tensor([[5, 6, 7], [8, 9, IGNORE]])).tolist() == [
        [6, 7, IGNORE],
        [9, IGNORE, IGNORE],
    ]


def test_mask_from_lengths_covers_the_first_positions() -> None:
    assert mask_from_lengths(torch.tensor([0, 1, 3]), 3).tolist() == [
        [False] * 3,
        [True, False, False],
        [True] * 3,
    ]


def test_final_end_token_is_scored_and_padding_with_the_same_id_is_not() -> None:
    end = pad = 2
    tokens = torch.tensor([[5, 7, end, pad, pad]])
    labels = next_token(tokens.masked_fill(~mask_from_lengths(torch.tensor([3]), 5), IGNORE))
    assert labels.tolist() == [[7, end, IGNORE, IGNORE, IGNORE]]


@pytest.mark.parametrize(("shape", "moved"), [((2, 7), (2, 7)), ((2, 3, 7), (2, 3, 7)), ((2, 7, 3, 4), (2, 3, 4, 7))])
def test_classes_last_moves_the_channel_axis_of_images_only(shape: tuple[int, ...], moved: tuple[int, ...]) -> None:
    assert classes_last(torch.zeros(shape)).shape == moved

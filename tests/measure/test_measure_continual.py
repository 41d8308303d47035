"""Measures of the result matrix, on values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from transfuse.core.errors import InputError, ShapeError
from transfuse.measure import (
    average_accuracy,
    backward_transfer,
    final_accuracy,
    forgetting,
    forward_transfer,
    result_matrix,
)

NAN = float("nan")
RESULTS = torch.tensor([[0.9, 0.3, 0.2], [0.7, 0.8, 0.5], [0.8, 0.6, 1.0]])


def test_final_accuracy_is_the_mean_of_the_last_row():
    assert final_accuracy(RESULTS) == pytest.approx((0.8 + 0.6 + 1.0) / 3)


def test_backward_transfer_compares_the_end_with_the_time_of_learning():
    assert backward_transfer(RESULTS) == pytest.approx(((0.8 - 0.9) + (0.6 - 0.8)) / 2)


def test_backward_transfer_is_positive_where_later_tasks_help():
    assert backward_transfer(torch.tensor([[0.5, 0.0], [0.7, 0.9]])) == pytest.approx(0.2)


def test_forward_transfer_compares_the_time_before_learning_with_an_untrained_model():
    assert forward_transfer(RESULTS, torch.tensor([0.5, 0.1, 0.2])) == pytest.approx(((0.3 - 0.1) + (0.5 - 0.2)) / 2)


def test_forgetting_is_measured_from_the_best_moment_before_the_end():
    assert forgetting(RESULTS) == pytest.approx(((0.9 - 0.8) + (0.8 - 0.6)) / 2)
    rises = torch.tensor([[0.5, 0, 0], [0.9, 0.8, 0], [0.7, 0.9, 1.0]])
    assert forgetting(rises) == pytest.approx(((0.9 - 0.7) + (0.8 - 0.9)) / 2)


def test_average_accuracy_is_the_mean_over_stages_of_what_has_been_seen():
    assert average_accuracy(RESULTS) == pytest.approx((0.9 + 0.75 + 0.8) / 3)


def test_average_accuracy_can_weigh_tasks_by_their_samples():
    found = average_accuracy(RESULTS, torch.tensor([30, 10, 10]))
    assert found == pytest.approx((0.9 + (0.7 * 30 + 0.8 * 10) / 40 + (0.8 * 30 + 0.6 * 10 + 1.0 * 10) / 50) / 3)


def test_what_was_not_measured_matters_only_where_it_is_read():
    lower = torch.tensor([[0.9, NAN, NAN], [0.7, 0.8, NAN], [0.8, 0.6, 1.0]])
    assert forgetting(lower) == forgetting(RESULTS) and average_accuracy(lower) == average_accuracy(RESULTS)
    with pytest.raises(InputError, match="forward transfer needs entries"):
        forward_transfer(lower, torch.zeros(3))


def test_one_task_has_an_accuracy_and_nothing_else():
    one = torch.tensor([[0.5]])
    assert final_accuracy(one) == average_accuracy(one) == 0.5
    for measure in (backward_transfer, forgetting):
        with pytest.raises(ShapeError, match="at least 2 task"):
            measure(one)


def test_wrong_shapes_are_refused():
    for wrong in (torch.zeros(2, 3), torch.zeros(4), torch.zeros(0, 0)):
        with pytest.raises(ShapeError, match="expected a result matrix"):
            final_accuracy(wrong)
    with pytest.raises(ShapeError, match="scores of the untrained model"):
        forward_transfer(RESULTS, torch.zeros(2))
    with pytest.raises(ShapeError, match="sizes of held-out sets"):
        average_accuracy(RESULTS, torch.ones(2))


def test_the_matrix_is_made_from_what_a_transfer_scored_after_every_stage():
    stages = [{"0": 0.9, "1": 0.3}, {"0": 0.7, "1": 0.8}]
    assert result_matrix(stages).tolist() == [[0.9, 0.3], [0.7, 0.8]]
    for wrong in ([], stages[:1], [stages[0], {"0": 0.5}], [stages[0], {"0": 0.5, "2": 0.1}]):
        with pytest.raises(ShapeError, match="same held-out set"):
            result_matrix(wrong)

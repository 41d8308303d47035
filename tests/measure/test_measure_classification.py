import math

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, recall_score

from transfuse.core.errors import InputError, ShapeError
from transfuse.measure import (
    correct,
    negative_log_likelihood,
    paired,
    per_class_accuracy,
    per_class_gain,
)

LOGITS = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(4, (60,), generator=torch.Generator().manual_seed(1))


def test_mean_of_correct_is_the_accuracy():
    assert correct(LOGITS, LABELS).mean().item() == pytest.approx(accuracy_score(LABELS, LOGITS.argmax(1)))


def test_correct_is_one_or_zero_per_sample():
    assert correct(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1])).tolist() == [1.0, 0.0]


def test_negative_log_likelihood_is_the_log_loss_in_nats():
    values = negative_log_likelihood(LOGITS, LABELS)
    assert values.shape == (60,)
    assert values.mean().item() == pytest.approx(log_loss(LABELS, LOGITS.double().softmax(1)), rel=1e-6)
    assert negative_log_likelihood(torch.zeros(1, 8), torch.tensor([3])).item() == pytest.approx(math.log(8))


def test_negative_log_likelihood_is_computed_in_float32_at_least():
    logits = torch.tensor([[12.0, 0.0]], dtype=torch.bfloat16)
    assert negative_log_likelihood(logits, torch.tensor([0])).item() == pytest.approx(math.exp(-12), rel=1e-2)


def test_labels_may_be_any_integer_type():
    for dtype in (torch.uint8, torch.int32):
        assert correct(LOGITS, LABELS.to(dtype)).equal(correct(LOGITS, LABELS))
        assert negative_log_likelihood(LOGITS, LABELS.to(dtype)).equal(negative_log_likelihood(LOGITS, LABELS))


def test_per_class_accuracy_is_the_recall():
    values = per_class_accuracy(correct(LOGITS, LABELS), LABELS, classes=4)
    assert values.tolist() == pytest.approx(recall_score(LABELS, LOGITS.argmax(1), average=None).tolist())


def test_a_class_without_samples_has_no_accuracy():
    values = per_class_accuracy(torch.tensor([1.0, 0.0]), torch.tensor([0, 2]), classes=4)
    assert values[[0, 2]].tolist() == [1.0, 0.0]
    assert values[[1, 3]].isnan().all()


def test_per_class_gain_is_the_paired_difference_within_the_class():
    right = torch.stack([correct(LOGITS + i * torch.eye(4)[LABELS], LABELS) for i in (1, 2)])
    baseline = torch.stack([correct(LOGITS, LABELS), correct(-LOGITS, LABELS)])
    rows = per_class_gain(right, baseline, LABELS, classes=4)
    assert [row["class"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        members = row["class"] == LABELS
        expected = paired(right[:, members], baseline[:, members])
        assert (row["gain"], row["low"], row["high"]) == (expected.mean, expected.low, expected.high)
        assert row["count"] == members.sum()
    mean = sum(row["gain"] * row["count"] for row in rows) / 60
    assert mean == pytest.approx((right - baseline).mean().item())


def test_per_class_gain_leaves_out_classes_without_samples():
    rows = per_class_gain(torch.ones(1, 3), torch.zeros(1, 3), torch.tensor([0, 5, 5]), classes=9)
    assert rows == [
        {"class": 0, "gain": 1.0, "low": 1.0, "high": 1.0, "count": 1},
        {"class": 5, "gain": 1.0, "low": 1.0, "high": 1.0, "count": 2},
    ]


@pytest.mark.parametrize("label", [-100, -1, 4])
def test_refuses_labels_out_of_range(label):
    labels = LABELS.clone()
    labels[3] = label
    message = rf"in \[0, 4\), found \[{label}\] in 1 samples"
    with pytest.raises(InputError, match=message):
        correct(LOGITS, labels)
    with pytest.raises(InputError, match=message):
        negative_log_likelihood(LOGITS, labels)
    with pytest.raises(InputError, match=message):
        per_class_accuracy(torch.ones(60), labels, classes=4)
    with pytest.raises(InputError, match=message):
        per_class_gain(torch.ones(1, 60), torch.ones(1, 60), labels, classes=4)


def test_refuses_labels_that_are_not_indices():
    with pytest.raises(InputError, match="float32"):
        correct(LOGITS, LABELS.float())
    with pytest.raises(ShapeError, match="60 samples"):
        correct(LOGITS, LABELS[:-1])
    with pytest.raises(ShapeError, match="60 samples"):
        correct(LOGITS, torch.nn.functional.one_hot(LABELS))


def test_refuses_logits_that_say_nothing():
    for bad in (float("nan"), float("inf")):
        logits = LOGITS.clone()
        logits[5, 1] = bad
        with pytest.raises(InputError, match="1 of 60 samples"):
            correct(logits, LABELS)
    with pytest.raises(ShapeError, match=r"\(60, 1, 4\)"):
        correct(LOGITS[:, None], LABELS)


@pytest.mark.parametrize("shape", [(2, 60), (1, 59), (60,)])
def test_per_class_gain_refuses_sides_that_do_not_pair(shape):
    with pytest.raises(ShapeError):
        per_class_gain(torch.ones(1, 60), torch.ones(shape), LABELS, classes=4)
    with pytest.raises(ShapeError):
        per_class_gain(torch.ones(60), torch.ones(60), LABELS, classes=4)


def test_a_class_that_is_ruled_out_is_no_error():
    logits = LOGITS.clone()
    logits[torch.arange(60), (LABELS + 1) % 4] = -torch.inf
    assert negative_log_likelihood(logits, LABELS).isfinite().all()

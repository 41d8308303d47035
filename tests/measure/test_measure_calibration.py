import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from transfuse.core.errors import InputError
from transfuse.measure import brier_score, expected_calibration_error, reliability


def sampled(scale: float, classes: int = 6, samples: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(samples, classes, generator=generator)
    return logits, torch.randint(classes, (samples,), generator=generator)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("bins", [1, 10, 15])
def test_equals_torchmetrics(scale, bins):
    logits, labels = sampled(scale)
    reference = multiclass_calibration_error(logits, labels, num_classes=6, n_bins=bins, norm="l1")
    assert expected_calibration_error(logits, labels, bins) == pytest.approx(reference.item(), abs=1e-6)


def test_is_zero_when_confidence_is_the_accuracy():
    logits = torch.tensor([[math.log(3), 0.0]]).expand(8, 2)  # 75 % sure of class 0
    labels = torch.tensor([0, 0, 0, 1] * 2)
    assert expected_calibration_error(logits, labels) == pytest.approx(0, abs=1e-7)


def test_is_the_error_rate_of_a_classifier_that_is_always_sure():
    logits = torch.tensor([[1000.0, 0.0]]).expand(10, 2)
    labels = torch.tensor([0] * 7 + [1] * 3)
    assert expected_calibration_error(logits, labels) == pytest.approx(0.3)


def test_certain_samples_are_in_the_last_bin_with_the_nearly_certain():
    logits = torch.tensor([[1000.0, 0.0], [5.0, 0.0]])
    assert reliability(logits, torch.tensor([0, 0])).count.tolist() == [0] * 14 + [2]


def test_an_edge_belongs_to_the_bin_below():
    diagram = reliability(torch.zeros(3, 2), torch.tensor([0, 0, 1]), bins=4)  # all 50 % sure of class 0
    assert diagram.count.tolist() == [0, 3, 0, 0]
    assert diagram.confidence[1].item() == pytest.approx(0.5)
    assert diagram.accuracy[1].item() == pytest.approx(2 / 3)


def test_empty_bins_have_no_accuracy():
    diagram = reliability(*sampled(1.0), bins=20)
    empty = diagram.count == 0
    assert empty[:3].all()  # one of six classes is never less than a sixth probable
    assert diagram.accuracy.isnan().equal(empty)
    assert diagram.confidence.isnan().equal(empty)


def test_every_sample_is_in_the_bin_of_its_confidence():
    logits, labels = sampled(2.0)
    diagram = reliability(logits, labels)
    edges = torch.linspace(0, 1, 16)
    assert diagram.count.sum() == len(labels)
    filled = diagram.count > 0
    assert (diagram.confidence > edges[:-1])[filled].all()
    assert (diagram.confidence <= edges[1:])[filled].all()


def test_refuses_what_cannot_be_binned():
    logits, labels = sampled(1.0)
    with pytest.raises(InputError, match="at least 1 bin"):
        reliability(logits, labels, bins=0)
    with pytest.raises(InputError, match=r"in \[0, 6\)"):
        expected_calibration_error(logits, labels + 1)
    with pytest.raises(InputError, match="at least one sample"):
        expected_calibration_error(logits[:0], labels[:0])


def test_a_calibrated_stream_has_almost_no_error():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(100_000, 5, generator=draw)
    labels = torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]
    assert expected_calibration_error(logits, labels) < 0.01


def test_brier_score_is_the_squared_distance_to_the_truth():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]])
    found = brier_score(probabilities.log(), torch.tensor([0, 2]))
    assert found.tolist() == pytest.approx([0.09 + 0.04 + 0.01, 0.49 + 0.04 + 0.81])


def test_brier_score_goes_from_sure_and_right_to_sure_and_wrong():
    logits = torch.tensor([[1000.0, 0.0]]).expand(2, 2)
    assert brier_score(logits, torch.tensor([0, 1])).tolist() == [0.0, 2.0]
    with pytest.raises(InputError, match=r"in \[0, 2\)"):
        brier_score(logits, torch.tensor([0, 2]))

import json
import math

import pytest
import torch
from scipy import stats

from transfuse.core.errors import InputError, ShapeError
from transfuse.measure import Interval, bootstrap, paired
from transfuse.measure.interval import _t_quantile


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ends(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def test_prints_gain_and_interval():
    assert str(Interval(0.1234, 0.11, 0.1349)) == "+0.123 [0.110, 0.135]"
    assert str(Interval(-0.0001, -0.02, 0.01)) == "+0.000 [-0.020, 0.010]"


def test_goes_to_json():
    interval = bootstrap(normal(2, 10), confidence=0.9)
    assert Interval(**json.loads(json.dumps(interval.as_dict()))) == interval
    assert interval.confidence == 0.9


def test_mean_is_the_mean_and_lies_inside():
    values = normal(3, 50)
    interval = bootstrap(values)
    assert interval.mean == pytest.approx(values.mean().item())
    assert interval.low < interval.mean < interval.high


def test_identical_inputs_differ_by_exactly_zero():
    values = normal(3, 50).float()
    assert paired(values, values.clone()) == Interval(0.0, 0.0, 0.0)


def test_equals_scipy_for_one_seed():
    values = normal(1, 200)
    reference = stats.bootstrap(
        (values[0].numpy(),),
        lambda x, axis: x.mean(axis=axis),
        n_resamples=20_000,
        method="percentile",
        rng=0,
    ).confidence_interval
    assert ends(bootstrap(values, draws=20_000)) == pytest.approx([reference.low, reference.high], abs=0.005)


def test_equals_a_plain_loop_over_both_axes():
    values = normal(4, 12) + normal(4, 1, seed=1)
    # Three degrees of freedom: the seeds are moved apart by what a t interval is wider than a bootstrap of four.
    stretch = math.sqrt(4 / 3) * stats.t.ppf(0.95, 3) / stats.norm.ppf(0.95)
    moved = values + (stretch - 1) * (values.mean(1, keepdim=True) - values.mean())
    generator = torch.Generator().manual_seed(7)
    means = []
    for _ in range(20_000):
        rows = torch.randint(4, (4,), generator=generator)
        columns = torch.randint(12, (12,), generator=generator)
        means.append(moved[rows][:, columns].mean())
    reference = torch.stack(means).quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
    assert ends(bootstrap(values, confidence=0.9, draws=20_000)) == pytest.approx(reference, abs=0.05)


@pytest.mark.parametrize("freedom", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("quantile", [0.75, 0.95, 0.975, 0.995])
def test_the_t_quantile_is_scipys(quantile, freedom):
    assert _t_quantile(quantile, freedom) == pytest.approx(stats.t.ppf(quantile, freedom), rel=2e-3)


@pytest.mark.parametrize("seeds", [3, 5])
def test_covers_the_true_mean_with_few_seeds_that_differ_more_than_samples(seeds):
    covered = 0
    for trial in range(400):
        values = normal(seeds, 1, seed=trial) + 0.5 * normal(seeds, 40, seed=1000 + trial)
        interval = bootstrap(values, draws=400, seed=trial)
        covered += interval.low <= 0 <= interval.high
    assert 0.90 <= covered / 400 <= 0.99


def test_seeds_that_differ_widen_the_interval():
    sample_wise = normal(1, 400)
    same = bootstrap(sample_wise.expand(5, -1))
    differing = bootstrap(sample_wise + normal(5, 1, seed=1))
    assert differing.high - differing.low > 3 * (same.high - same.low)


def test_pairing_removes_what_both_sides_share():
    baseline = normal(3, 100)
    shift = paired(baseline + 0.1, baseline)
    assert ends(shift) == pytest.approx([0.1, 0.1])


def test_covers_the_true_paired_difference_as_often_as_it_says():
    # A sample is right where a normal variable is positive: the sample's ease, what the method adds to it
    # (0.5 on average), and the seed's luck. So the true accuracies are normal distribution functions.
    truth = stats.norm.cdf(0.5 / 2.01**0.5) - 0.5
    covered = 0
    for trial in range(400):
        draw = torch.Generator().manual_seed(trial)
        ease = torch.randn(1, 150, generator=draw)
        added = 0.5 + torch.randn(1, 150, generator=draw)
        baseline = (ease + 0.1 * torch.randn(5, 1, generator=draw) > 0).float()
        method = (ease + added + 0.1 * torch.randn(5, 1, generator=draw) > 0).float()
        interval = paired(method, baseline, draws=400, seed=trial)
        covered += interval.low <= truth <= interval.high
    assert 0.90 <= covered / 400 <= 0.98


def test_covers_the_true_mean_when_only_samples_differ():
    covered = 0
    for trial in range(400):
        interval = bootstrap(normal(1, 100, seed=trial), draws=400, seed=trial)
        covered += interval.low <= 0 <= interval.high
    assert 0.90 <= covered / 400 <= 0.98


def test_shrinks_with_the_square_root_of_the_samples():
    small, large = bootstrap(normal(1, 400)), bootstrap(normal(1, 6400))
    assert (small.high - small.low) / (large.high - large.low) == pytest.approx(4, rel=0.15)


def test_widens_with_confidence():
    values = normal(2, 100)
    narrow, wide = bootstrap(values, confidence=0.5), bootstrap(values, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_repeats_for_the_same_seed_only():
    values = normal(3, 100)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert ends(bootstrap(values, seed=1)) != ends(bootstrap(values, seed=2))


def test_holds_few_draws_at_once(monkeypatch):
    largest = 0
    randint = torch.randint

    def spy(high: int, size: tuple[int, int], **options: object) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return randint(high, size, **options)

    monkeypatch.setattr(torch, "randint", spy)
    interval = bootstrap(normal(1, 10_000), draws=500)
    assert 0 < largest <= 2**21
    assert ends(interval) == pytest.approx([interval.mean - 0.0196, interval.mean + 0.0196], abs=0.005)


def test_accepts_booleans():
    right = normal(2, 100) > 0
    assert paired(right, ~right).mean == pytest.approx(2 * right.double().mean().item() - 1)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_refuses_nothing(shape):
    with pytest.raises(InputError, match="nothing to resample"):
        bootstrap(torch.zeros(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_values_that_are_not_finite(bad):
    values = torch.zeros(2, 3)
    values[1, 1] = bad
    with pytest.raises(InputError, match="1 of 6 values are not finite"):
        bootstrap(values)
    with pytest.raises(InputError, match="not finite"):
        paired(values, values)


def test_refuses_shapes_that_do_not_pair():
    with pytest.raises(ShapeError, match=r"\(2, 5\) and \(1, 5\)"):
        paired(torch.zeros(2, 5), torch.zeros(1, 5))
    with pytest.raises(ShapeError, match=r"values\[None\]"):
        bootstrap(torch.zeros(5))


@pytest.mark.parametrize("options", [{"confidence": 95.0}, {"confidence": 0.0}, {"draws": 0}])
def test_refuses_options_out_of_range(options):
    with pytest.raises(InputError):
        bootstrap(torch.zeros(1, 5), **options)

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from transfuse.core.errors import InputError
from transfuse.datasets import Splits, load
from transfuse.datasets.splits import cuts, stratified
from transfuse.losses.reduction import IGNORE


def data(*counts: int) -> TensorDataset:
    """As many samples of class 0, 1, ... as the counts say."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return TensorDataset(torch.arange(len(labels)).float()[:, None], labels)


def kept(splits: Splits) -> torch.Tensor:
    assert isinstance(splits.train, TensorDataset)
    return torch.nonzero(splits.train.tensors[1] != IGNORE)[:, 0]


def test_few_labels_keeps_that_many_and_they_are_right() -> None:
    train = data(30, 30, 30)
    few = Splits(train).few_labels(12)
    assert isinstance(few.train, TensorDataset)
    assert len(kept(few)) == 12
    assert len(few.train) == 90
    assert (few.train.tensors[1][kept(few)] == train.tensors[1][kept(few)]).all()


def test_few_labels_leaves_inputs_other_parts_and_the_original_alone() -> None:
    splits = Splits(data(5, 5), data(2, 2), data(3, 3), ("a", "b"), "mine")
    few = splits.few_labels(4)
    assert isinstance(few.train, TensorDataset) and isinstance(splits.train, TensorDataset)
    assert few.train.tensors[0] is splits.train.tensors[0]
    assert (few.validate, few.test, few.classes, few.name) == (
        splits.validate,
        splits.test,
        ("a", "b"),
        "mine",
    )
    assert len(kept(splits)) == 10


@pytest.mark.parametrize(
    ("counts", "count", "expected"),
    [
        ((30, 30, 30), 12, [4, 4, 4]),
        ((2, 30, 30), 12, [2, 5, 5]),
        ((2, 1, 3), 6, [2, 1, 3]),
        ((9, 9), 2, [1, 1]),
    ],
)
def test_few_labels_deals_the_labels_out_evenly(counts: tuple[int, ...], count: int, expected: list[int]) -> None:
    train = data(*counts)
    found = train.tensors[1][kept(Splits(train).few_labels(count))].bincount(minlength=len(counts))
    assert found.tolist() == expected


def test_few_labels_is_drawn_by_the_seed() -> None:
    splits = Splits(data(50, 50))
    assert torch.equal(kept(splits.few_labels(20, seed=1)), kept(splits.few_labels(20, seed=1)))
    assert not torch.equal(kept(splits.few_labels(20, seed=1)), kept(splits.few_labels(20, seed=2)))


def test_few_labels_of_one_seed_are_nested() -> None:
    splits = Splits(data(20, 50, 50))
    assert set(kept(splits.few_labels(11)).tolist()) < set(kept(splits.few_labels(70)).tolist())


def test_few_labels_skips_samples_that_have_none() -> None:
    train = data(10, 10)
    train.tensors[1][5:] = IGNORE
    train.tensors[1][-1] = 1
    assert kept(Splits(train).few_labels(6)).tolist() == [0, 1, 2, 3, 4, 19]


@pytest.mark.parametrize("count", [0, 2, 31])
def test_few_labels_refuses_counts_that_cannot_be(count: int) -> None:
    with pytest.raises(InputError, match=f"keep between 3 and 30 of them, found {count}"):
        Splits(data(10, 10, 10)).few_labels(count)


def test_few_labels_refuses_other_data_sets() -> None:
    with pytest.raises(InputError, match="found Subset as the train part of mine"):
        Splits(Subset(data(5, 5), [0, 9]), name="mine").few_labels(2)
    with pytest.raises(InputError, match="found TensorDataset"):
        Splits(TensorDataset(torch.zeros(5))).few_labels(2)


@pytest.mark.parametrize("wrong", [-1, 2])
def test_labels_outside_the_classes_are_refused(wrong: int) -> None:
    test = data(3, 3)
    test.tensors[1][4] = wrong
    with pytest.raises(InputError, match=f"the labels of mine must be 0 to 1 .* found {wrong}"):
        Splits(data(3, 3), test=test, classes=("a", "b"), name="mine")


def test_labels_that_are_no_integers_are_refused() -> None:
    with pytest.raises(InputError, match="must be integers, found torch.float32"):
        Splits(TensorDataset(torch.zeros(4, 1), torch.zeros(4)), classes=("a", "b"))


def test_hidden_labels_are_allowed() -> None:
    labels = torch.tensor([0, IGNORE])
    Splits(TensorDataset(torch.zeros(2, 1), labels), classes=("a", "b"))


def test_cuts_cover_everything_once() -> None:
    assert cuts(10, (0.7, 0.2, 0.1)) == [0, 7, 9, 10]
    assert cuts(10, (1, 0, 0)) == [0, 10, 10, 10]
    assert all(cuts(n, (0.7, 0.15, 0.15))[-1] == n for n in range(200))


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.7, 0.2, 0.2), (0, 0.5, 0.5), (1.2, -0.1, -0.1)])
def test_fractions_that_make_no_split_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="three numbers for train, validate and test that add to 1"):
        cuts(10, fractions)


def test_stratified_parts_are_disjoint_complete_and_have_the_same_shares() -> None:
    labels = data(100, 40, 20).tensors[1]
    parts = stratified(labels, (0.5, 0.3, 0.2), seed=0)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(160))
    assert [labels[p].bincount().tolist() for p in parts] == [[50, 20, 10], [30, 12, 6], [20, 8, 4]]


def test_stratified_parts_are_shuffled_by_the_seed() -> None:
    labels = data(50, 50).tensors[1]
    first, again, other = (stratified(labels, (0.6, 0.2, 0.2), seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert set(first.tolist()) != set(other.tolist())
    assert not torch.equal(first, first.sort().values)


def test_stratified_refuses_a_part_that_stays_empty() -> None:
    with pytest.raises(InputError, match="4 samples are too few"):
        stratified(data(2, 2).tensors[1], (0.8, 0.1, 0.1), seed=0)


def test_load_names_the_nearest_data_set() -> None:
    with pytest.raises(InputError, match="there is no data set 'fashion_mnist'; did you mean 'fashion-mnist'"):
        load("fashion_mnist")


def test_load_names_the_accepted_arguments() -> None:
    with pytest.raises(InputError, match="data set 'digits' has no argument 'lables'; it takes: labels=None, seed=0"):
        load("digits", lables=50)


def test_load_names_the_argument_that_is_missing() -> None:
    with pytest.raises(InputError, match="data set 'table' needs the argument 'label'; it takes: path, label, "):
        load("table", path="x.csv")

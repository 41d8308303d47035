from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CNN, images, trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from transfuse.core.errors import InputError
from transfuse.core.method import Method
from transfuse.core.phases import Observe, Stage
from transfuse.core.rng import derive
from transfuse.core.streams import Cursor, Draw, Generated, Indexed, Iterated, Stream, as_data
from transfuse.distill import Labels

X = torch.arange(20.0).reshape(10, 2)
Y = torch.arange(10)


class Pairs(Dataset[tuple[Tensor, int]]):
    """A Python data set whose samples are what their number says, with noise from all three generators."""

    def __init__(self, noise: float = 0.0, size: int = 10):
        self.noise, self.size = noise, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        drawn = torch.rand(()) + random.random() + np.random.rand()
        return torch.tensor([2.0 * i, 2.0 * i + 1]) + self.noise * drawn, i


def batches() -> Any:
    for start in range(0, 10, 4):
        yield X[start : start + 4], Y[start : start + 4]


def drawn(data: Any, *, seed: int = 0, name: str = "data", updates: int = 6, shuffle: bool = True, **draw: Any) -> Any:
    """What a cursor gives: for each update, its micro-batches' labels."""
    cursor = Cursor(as_data(data), Draw(4, draw.pop("micro_batch", None), shuffle, seed, **draw), name)
    return [[b.labels.tolist() for b in cursor.next()] for _ in range(updates)]


@pytest.fixture
def kinds() -> dict[str, Any]:
    return {
        "tensors": (X, Y),
        "mapping": {"inputs": X, "labels": Y},
        "tensor data set": TensorDataset(X, Y),
        "python data set": Pairs(),
        "list of samples": [(x, int(y)) for x, y in zip(X, Y, strict=True)],
        "list of dicts": [{"x": x, "label": int(y)} for x, y in zip(X, Y, strict=True)],
        "shuffling loader": DataLoader(Pairs(), batch_size=4, shuffle=True),
        "loader with a generator": DataLoader(Pairs(), batch_size=4, shuffle=True, generator=torch.Generator()),
        "list of batches": list(batches()),
        "generator function": batches,
    }


def test_every_kind_reads_each_sample_once_an_epoch(kinds):
    for name, data in kinds.items():
        epochs = drawn(data, updates=6)
        for epoch in (epochs[:3], epochs[3:]):
            # What we cut is even; what others batched is theirs.
            sizes = [3, 3, 4] if isinstance(as_data(data), Indexed) else [4, 4, 2]
            assert [len(u[0]) for u in epoch] == sizes, name
            assert sorted(i for update in epoch for i in update[0]) == list(range(10)), name


def test_every_kind_keeps_inputs_with_their_labels(kinds):
    for name, data in kinds.items():
        cursor = Cursor(as_data(data), Draw(4, None, True, 0), "data")
        for _ in range(3):
            (batch,) = cursor.next()
            inputs = batch.inputs["x"] if isinstance(batch.inputs, dict) else batch.inputs
            assert torch.equal(inputs, X[batch.labels]), name


def test_order_is_a_pure_function_of_seed_stage_stream_and_epoch(kinds):
    for name in set(kinds) - {"list of batches", "generator function"}:
        data = kinds[name]
        torch.manual_seed(1)
        first = drawn(data)
        torch.manual_seed(2)
        np.random.seed(2)
        assert drawn(data) == first, name
        assert drawn(data, seed=1) != first, name
        assert drawn(data, name="other") != first, name
        assert first[:3] != first[3:], name


def test_reading_does_not_touch_the_global_generators(kinds):
    for name in set(kinds) - {"python data set"}:  # its own draws belong to the run
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        drawn(kinds[name])
        as_data(kinds[name]).sample(3)
        assert torch.equal(torch.get_rng_state(), states[0]), name
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:], name


def test_goes_on_from_a_saved_position_in_every_kind(kinds):
    for name, data in kinds.items():
        draw = Draw(4, None, True, 0)
        cursor = Cursor(as_data(data), draw, "data")
        for _ in range(4):
            cursor.next()
        again = Cursor(as_data(data), draw, "data")
        again.load_state_dict(cursor.state_dict())
        for _ in range(4):
            one, other = cursor.next()[0], again.next()[0]
            assert one.labels.tolist() == other.labels.tolist(), name


@pytest.mark.parametrize("shuffle", [True, False])
def test_workers_read_the_same_samples_in_the_same_order(shuffle):
    assert drawn(Pairs(), workers=2, shuffle=shuffle) == drawn(Pairs(), shuffle=shuffle)


def test_what_workers_augment_depends_on_seed_and_samples_alone():
    def read(start: int) -> list[Tensor]:
        updates = Indexed(Pairs(noise=1.0)).epoch(Draw(4, None, True, 5, workers=2), start)
        return [micro[0].inputs for micro in updates]

    torch.manual_seed(1)
    whole = read(0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    rest = read(1)
    assert torch.equal(torch.get_rng_state(), state)  # or dropout after a resume would differ
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], rest, strict=True))
    assert not torch.equal(whole[0] - whole[0].round(), torch.zeros_like(whole[0]))


def test_without_shuffling_the_order_is_the_data_sets():
    assert drawn((X, Y), shuffle=False, updates=3) == [[[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8, 9]]]


@pytest.mark.parametrize("make", [lambda: (X, Y), Pairs, lambda: list(batches()), lambda: batches])
@pytest.mark.parametrize("world", [1, 2])
def test_micro_batches_and_processes_share_an_update(make, world):
    shares = [drawn(make(), updates=2, shuffle=False, micro_batch=1, rank=rank, world=world) for rank in range(world)]
    seen = 0
    for update in range(2):
        assert all(share[update] for share in shares)
        parts = [micro for share in shares for micro in share[update]]
        assert parts == [[seen + i] for i in range(len(parts))]
        seen += len(parts)


@pytest.mark.parametrize(
    ("size", "batch", "micro", "world"), [(65, 64, None, 1), (13, 6, 4, 2), (12, 12, 5, 1), (9, 4, 3, 2)]
)
def test_nothing_is_cut_into_a_small_rest(size, batch, micro, world):
    data = as_data(torch.arange(size).float())
    epochs = [list(data.epoch(Draw(batch, micro, True, 0, rank, world), 0)) for rank in range(world)]
    sizes = [b.size for epoch in epochs for update in epoch for b in update]
    assert sum(sizes) == size
    assert max(sizes) - min(sizes) <= 2
    assert max(sizes) <= (micro or batch)
    assert len(epochs[0]) == -(-size // batch)


# Ids


def test_index_is_the_id_in_the_root_data_set_through_any_subset():
    for root in (TensorDataset(X, Y), Pairs()):
        inner = Subset(root, [9, 7, 5, 3, 1])
        outer = Subset(inner, range(1, 4))
        batch = Indexed(outer).sample(10)
        assert batch.index.tolist() == [7, 5, 3]
        assert batch.labels.tolist() == [7, 5, 3]


def test_data_that_others_batch_has_no_index():
    assert Iterated(batches).sample(2).index is None


def test_keeps_the_samples_that_have_a_label():
    labels = torch.tensor([0, -100, 2, -100, 1, -100, -100, -100, -100, 5])
    subset = Subset(TensorDataset(X, labels), [9, 8, 2, 1])
    labelled = Indexed(subset).labelled()
    assert labelled.sample(10).index.tolist() == [9, 2]
    assert Indexed((X, Y)).labelled().size == 10
    with pytest.raises(InputError, match="no sample of this data has a label"):
        Indexed((X, torch.full((10,), -100))).labelled()
    with pytest.raises(InputError, match="has no labels"):
        Indexed(X).labelled()


# Ragged rows


def test_rows_of_different_length_are_padded_and_masked_by_their_length():
    samples = [{"input_ids": [1, 0, 3], "labels": [1, 0, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = Indexed(samples).sample(2)
    assert batch.inputs["input_ids"].tolist() == [[1, 0, 3], [4, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]  # token 0 is a real one here
    assert batch.labels.tolist() == [[1, 0, 3], [4, -100, -100]]


def test_a_list_of_token_samples_is_no_list_of_batches():
    row = torch.arange(5)
    data = as_data([{"input_ids": row, "attention_mask": torch.ones(5)}] * 3)
    assert data.sample(3).inputs["input_ids"].shape == (3, 5)


def test_reads_hugging_face_data_sets():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {"input_ids": [[1, 2], [3], [4, 5]], "label": [0, 1, 2], "text": ["a", "b", "c"]}
    )
    batch = as_data(table).sample(3)
    assert batch.inputs["input_ids"].tolist() == [[1, 2], [3, 0], [4, 5]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1], [1, 0], [1, 1]]
    assert batch.labels.tolist() == [0, 1, 2]
    assert as_data(Subset(table, [2])).sample(1).index.tolist() == [2]


# Iterators


@pytest.mark.parametrize("make", [batches, lambda: iter(list(batches()))], ids=["generator", "iterator"])
def test_a_one_shot_iterator_lasts_one_epoch_and_then_says_so(make):
    data = as_data(make())
    assert data.sample(2).labels.tolist() == [0, 1]
    assert data.sample(3).labels.tolist() == [0, 1, 2]  # looking costs no batch
    cursor = Cursor(data, Draw(4, None, True, 0), "data")
    assert [cursor.next()[0].labels.tolist() for _ in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    with pytest.raises(InputError, match="'data' has ended: an iterator can be read only once; pass a function"):
        cursor.next()


def test_a_generator_function_is_opened_once_an_epoch():
    opened = []

    def read() -> Any:
        opened.append(random.random())
        yield from batches()

    drawn(read, updates=6)
    assert len(opened) == 2
    before = opened[:]
    drawn(read, updates=6)
    assert opened[2:] == before  # with generators of its own


def test_adapts_what_the_data_yields():
    odd = [{"image": x, "class": torch.tensor(int(y)), "file": "a.png"} for x, y in zip(X, Y, strict=True)]
    data = as_data(odd, adapt=lambda item: (item["image"], item["class"]))
    assert data.sample(2).labels.tolist() == [0, 1]
    loader = DataLoader(Pairs(), batch_size=4)
    assert as_data(loader, adapt=lambda item: item[0]).sample(2).labels is None


# What cannot be read


@pytest.mark.parametrize("empty", [TensorDataset(X[:0]), [], X[:0], Subset(Pairs(), []), Pairs(size=0)])
def test_empty_data_is_refused(empty):
    with pytest.raises(InputError, match="empty"):
        as_data(empty)


@pytest.mark.parametrize("empty", [DataLoader(TensorDataset(X[:0])), lambda: iter(())])
def test_empty_loaders_are_refused_when_looked_at(empty):
    with pytest.raises(InputError, match="the data is empty: it has no batch"):
        as_data(empty).sample(1)


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        yield from X


@pytest.mark.parametrize("wrong", [3, "digits", None])
def test_refuses_what_is_no_data(wrong):
    with pytest.raises(InputError, match="cannot read data from"):
        as_data(wrong)


def test_refuses_single_samples_from_an_iterable_data_set():
    with pytest.raises(InputError, match="wrap it in a DataLoader"):
        as_data(Endless())
    assert as_data(DataLoader(Endless(), batch_size=4)).sample(3).inputs.shape == (3, 2)


def test_refuses_tensors_of_different_length():
    with pytest.raises(InputError, match="10 inputs but 9 labels"):
        as_data((X, Y[:9]))
    with pytest.raises(InputError, match="differ in length"):
        as_data({"inputs": X, "labels": Y[:9]})


def test_data_shorter_than_a_batch_is_refused_before_training():
    with pytest.raises(InputError, match="'data' has 12 samples, fewer than one batch of 13: use batch_size=12"):
        trainer(Labels(), CNN(), None, images(12), batch_size=13).fit()


def test_a_batch_smaller_than_the_number_of_processes_is_refused():
    updates = Iterated(batches).epoch(Draw(4, None, True, 0, rank=0, world=3), 0)
    assert [len(next(updates)) for _ in range(2)] == [1, 1]
    with pytest.raises(InputError, match=r"batch 2 holds 2 sample\(s\), fewer than the 3 processes"):
        next(updates)


# Several streams in one stage


class TwoStreams(Method):
    """Looks at what two streams give."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[tuple[Any, Any]] = []

    def look(self, batches: Any, run: Any) -> None:
        self._seen.append((batches["labelled"].labels.tolist(), batches["extra"].labels.tolist()))

    def stage(self, i: int, run: Any) -> Stage:
        extra = Stream(run.data["extra"], batch_size=2, shuffle=False)
        return Stage({"labelled": run.data["labelled"], "extra": extra}, [Observe("look", self.look)], epochs=2)


def two_streams(**settings: Any) -> TwoStreams:
    method = TwoStreams()
    data = {"labelled": as_data((X[:8], Y[:8])), "extra": as_data((X[:6], Y[:6]))}
    trainer(method, CNN(), None, data, batch_size=4, **settings).fit()
    return method


def test_the_first_stream_defines_the_epoch_and_others_start_again():
    seen = two_streams()._seen
    assert len(seen) == 4  # two epochs of two updates
    assert [other for _, other in seen] == [[0, 1], [2, 3], [4, 5], [0, 1]]
    for epoch in (seen[:2], seen[2:]):
        assert sorted(epoch[0][0] + epoch[1][0]) == list(range(8))


def test_streams_with_different_numbers_of_micro_batches_are_refused():
    with pytest.raises(InputError, match="'extra' gives 1 micro-batches where the first stream gives 2"):
        two_streams(micro_batch=2)


def test_generated_data_only_says_how_long_an_epoch_is_and_how_many_samples_to_make():
    data = Generated(3)
    assert data.updates(64) == 3
    assert data.sample(5) is None
    assert [len(micro) for micro in data.epoch(Draw(4, 2, True, 0), 1)] == [2, 2]
    one, other = next(data.epoch(Draw(5, 3, True, 0), 0))
    assert (one.size, other.size) == (2, 3) and list(one) == ["index"]
    shares = [next(data.epoch(Draw(5, None, True, 0, rank, 2), 0))[0].index.tolist() for rank in (0, 1)]
    assert shares == [[0, 1], [2, 3, 4]]


def test_seeds_differ_with_every_part_and_are_the_same_everywhere():
    assert derive(0, "data", 1) == 2247614744653750975
    assert len({derive(0, "data", 1), derive(1, "data", 1), derive(0, "more", 1), derive(0, "data", 2)}) == 4


def test_a_subset_of_data_without_labels_has_none():
    data = as_data((torch.randn(6, 2), torch.arange(6)))
    bare = data.without_labels()
    assert bare.fetch(torch.tensor([1])).labels is None
    assert bare.subset(torch.tensor([1, 2])).fetch(torch.tensor([0])).labels is None
    assert data.subset(torch.tensor([1, 2])).fetch(torch.tensor([0])).labels.tolist() == [1]

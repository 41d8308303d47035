from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from torch.utils.data import DataLoader, default_collate

from transfuse.core.errors import InputError, MissingExtraError, ShapeError, StoreError
from transfuse.datasets import hf_dataset


def part(labels: list[Any], names: list[str] | None = None) -> Dataset:
    data = Dataset.from_dict(
        {"tokens": [[i, i + 1] for i in range(len(labels))], "note": ["x"] * len(labels), "label": labels}
    )
    return data.cast_column("label", ClassLabel(names=names)) if names else data


@pytest.fixture
def whole() -> DatasetDict:
    names = ["no", "yes"]
    parts = {"train": [0, 1, 1, 0], "validation": [1, 0], "test": [1]}
    return DatasetDict({name: part(labels, names) for name, labels in parts.items()})


def test_samples_are_dicts_of_tensors_under_the_new_names(whole: DatasetDict) -> None:
    splits = hf_dataset(whole, columns={"tokens": "input_ids"})
    sample = splits.train[1]
    assert set(sample) == {"input_ids", "labels"}
    assert sample["input_ids"].tolist() == [1, 2]
    assert sample["labels"].item() == 1
    batch = next(iter(DataLoader(splits.train, batch_size=3, collate_fn=default_collate)))
    assert batch["labels"].tolist() == [0, 1, 1]


def test_parts_and_class_names_are_found(whole: DatasetDict) -> None:
    splits = hf_dataset(whole)
    assert [len(p) for p in (splits.train, splits.validate, splits.test)] == [4, 2, 1]
    assert splits.classes == ("no", "yes")


def test_all_columns_are_kept_by_default(whole: DatasetDict) -> None:
    assert set(hf_dataset(whole).train[0]) == {"tokens", "note", "labels"}


def test_a_saved_data_set_gives_the_same(whole: DatasetDict, tmp_path: Path) -> None:
    whole.save_to_disk(str(tmp_path / "answers"))
    splits = hf_dataset(tmp_path / "answers", columns={"tokens": "input_ids"})
    assert splits.name == "answers"
    assert splits.classes == ("no", "yes")
    assert torch.equal(splits.validate[:]["labels"], torch.tensor([1, 0]))


def test_a_single_data_set_is_the_train_part() -> None:
    splits = hf_dataset(part([0, 2, 1]))
    assert splits.classes == ("0", "1", "2")
    assert splits.validate is None and splits.test is None


def test_integer_classes_are_counted_over_all_parts() -> None:
    data = DatasetDict(train=part([0, 1]), validate=part([3]))
    assert hf_dataset(data).classes == ("0", "1", "2", "3")


def test_data_without_classes_needs_no_label(whole: DatasetDict) -> None:
    splits = hf_dataset(whole, columns={"tokens": "input_ids"}, label=None, task="language-model")
    assert set(splits.train[0]) == {"input_ids"}
    assert splits.classes is None
    assert splits.task == "language-model"


def test_the_data_set_of_the_caller_stays_as_it_was(whole: DatasetDict) -> None:
    hf_dataset(whole, columns={"tokens": "input_ids"})
    assert whole["train"].column_names == ["tokens", "note", "label"]
    assert whole["train"][0]["tokens"] == [0, 1]


def test_unknown_columns_are_named_with_the_nearest(whole: DatasetDict) -> None:
    with pytest.raises(InputError, match="no column 'token'; did you mean 'tokens'"):
        hf_dataset(whole, columns={"token": "input_ids"})
    with pytest.raises(InputError, match="no column 'labels'; did you mean 'label'"):
        hf_dataset(whole, label="labels")


def test_two_columns_cannot_have_one_name(whole: DatasetDict) -> None:
    with pytest.raises(InputError, match="two columns would get the same name"):
        hf_dataset(whole, columns={"tokens": "a", "note": "a"})


def test_unknown_parts_are_named(whole: DatasetDict) -> None:
    whole["dev"] = whole["test"]
    with pytest.raises(InputError, match="remove or rename 'dev'"):
        hf_dataset(whole)


def test_a_part_cannot_come_twice(whole: DatasetDict) -> None:
    whole["validate"] = whole["test"]
    with pytest.raises(InputError, match="remove or rename 'validate'"):
        hf_dataset(whole)


def test_train_must_be_there(whole: DatasetDict) -> None:
    del whole["train"]
    with pytest.raises(InputError, match="no train part"):
        hf_dataset(whole)


@pytest.mark.parametrize("names", [["no", "yes"], None])
def test_hidden_test_labels_are_refused(names: list[str] | None) -> None:
    data = DatasetDict(train=part([0, 1], names), test=part([-1, -1], names))
    with pytest.raises(InputError, match="the labels of the test part must be 0 to 1 .* found -1"):
        hf_dataset(data)


@pytest.mark.parametrize(("odd", "shown"), [("cat", "'cat'"), (None, "None"), (0.5, "0.5"), ([1], r"\[1\]")])
def test_labels_that_are_no_class_numbers_are_refused(odd: Any, shown: str) -> None:
    with pytest.raises(InputError, match=f"the labels of the train part must be class numbers, found {shown}"):
        hf_dataset(part([odd, odd]))


def test_an_empty_part_is_refused() -> None:
    with pytest.raises(InputError, match="the test part is empty"):
        hf_dataset(DatasetDict(train=part([0, 1]), test=part([0, 1]).select([])))


def test_parts_must_agree_on_the_classes() -> None:
    data = DatasetDict(train=part([0, 1], ["no", "yes"]), test=part([0, 1], ["yes", "no"]))
    with pytest.raises(ShapeError, match="name their classes differently"):
        hf_dataset(data)


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no data set that save_to_disk wrote"):
        hf_dataset(tmp_path)


def test_names_on_the_hub_are_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_from_disk", lambda *_: pytest.fail("asked the library for an address"))
    with pytest.raises(StoreError, match="there is no folder hf://datasets/someone/something"):
        hf_dataset("hf://datasets/someone/something")


def test_other_sources_are_refused() -> None:
    with pytest.raises(InputError, match="expected a folder, a Dataset or a DatasetDict, found list"):
        hf_dataset([1, 2])  # type: ignore[arg-type]


def test_says_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"hf_dataset needs datasets.*transfuse\[hf\]"):
        hf_dataset("x")

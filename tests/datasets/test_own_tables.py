from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from transfuse.core.errors import InputError, MissingExtraError, StoreError
from transfuse.datasets import table


def frame(rows: int = 40) -> pandas.DataFrame:
    """`height` is the row number plus a million, so that its variance needs float64; `kind` alternates."""
    numbers = torch.arange(rows)
    return pandas.DataFrame(
        {
            "height": (numbers + 1_000_000).tolist(),
            "always": [0.1] * rows,
            "kind": ["pear", "apple"] * (rows // 2),
        }
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "fruit.csv"


def save(data: pandas.DataFrame, file: Path) -> Path:
    data.to_csv(file, index=False)
    return file


def tensors(part: Dataset[Any] | None) -> tuple[Tensor, Tensor]:
    assert isinstance(part, TensorDataset)
    inputs, labels = part.tensors
    return inputs, labels


def test_labels_are_numbered_in_sorted_order(file: Path) -> None:
    splits = table(save(frame(), file), "kind", standardize=False)
    assert splits.classes == ("apple", "pear")
    assert splits.name == "fruit"
    for part in (splits.train, splits.validate, splits.test):
        inputs, labels = tensors(part)
        assert torch.equal(labels, 1 - inputs[:, 0].long() % 2)
        assert (inputs.dtype, labels.dtype) == (torch.float32, torch.int64)


def test_number_labels_are_sorted_as_numbers(file: Path) -> None:
    data = frame().assign(kind=[10, 9] * 20)
    assert table(save(data, file), "kind").classes == ("9", "10")


def test_every_row_is_in_one_part(file: Path) -> None:
    splits = table(save(frame(), file), "kind", standardize=False, fractions=(0.5, 0.25, 0.25))
    parts = [tensors(p)[0][:, 0] for p in (splits.train, splits.validate, splits.test)]
    assert [len(p) for p in parts] == [20, 10, 10]
    assert torch.cat(parts).sort().values.tolist() == [1_000_000 + i for i in range(40)]


def test_train_alone_decides_how_features_are_standardised(file: Path) -> None:
    save(frame(), file)
    raw, scaled = table(file, "kind", standardize=False), table(file, "kind")
    train = tensors(raw.train)[0][:, 0].double()
    for part in ("train", "validate", "test"):
        values = tensors(getattr(raw, part))[0][:, 0].double()
        expected = (values - train.mean()) / train.std(correction=0)
        torch.testing.assert_close(tensors(getattr(scaled, part))[0][:, 0], expected.float())


def test_constant_feature_becomes_zero(file: Path) -> None:
    inputs, _ = tensors(table(save(frame(), file), "kind").train)
    assert (inputs[:, 1] == 0).all()


def test_features_are_taken_in_the_given_order(file: Path) -> None:
    data = frame().assign(extra="text")
    splits = table(save(data, file), "kind", features=["always", "height"], standardize=False)
    assert tensors(splits.train)[0][0, 0] == pytest.approx(0.1)


def test_parquet_gives_the_same_as_csv(tmp_path: Path, file: Path) -> None:
    frame().to_parquet(tmp_path / "fruit.parquet")
    one, other = table(save(frame(), file), "kind"), table(tmp_path / "fruit.parquet", "kind")
    assert torch.equal(tensors(one.test)[0], tensors(other.test)[0])
    assert torch.equal(tensors(one.test)[1], tensors(other.test)[1])


def test_split_is_drawn_by_the_seed(file: Path) -> None:
    save(frame(), file)
    first, again, other = (
        sorted(tensors(table(file, "kind", standardize=False, seed=s).test)[0][:, 0].tolist()) for s in (0, 0, 1)
    )
    assert first == again != other


def test_missing_column_is_named_with_the_nearest(file: Path) -> None:
    save(frame(), file)
    with pytest.raises(InputError, match="has no column 'kinds'; did you mean 'kind'"):
        table(file, "kinds")
    with pytest.raises(InputError, match="has no column 'hight'; did you mean 'height'"):
        table(file, "kind", features=["hight"])


def test_label_is_no_feature(file: Path) -> None:
    data = frame().assign(kind=[0, 1] * 20)
    with pytest.raises(InputError, match="features are the columns other than the label 'kind'"):
        table(save(data, file), "kind", features=["height", "kind"])


def test_table_without_features_is_refused(file: Path) -> None:
    with pytest.raises(InputError, match=r"found \[\]"):
        table(save(frame()[["kind"]], file), "kind")


def test_feature_that_is_no_number_is_named(file: Path) -> None:
    with pytest.raises(InputError, match="the feature 'colour' .* is not numeric .for example 'red'"):
        table(save(frame().assign(colour="red"), file), "kind")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_no_finite_number_is_named(file: Path, value: float) -> None:
    data = frame()
    data.loc[[7, 9], "always"] = value
    with pytest.raises(InputError, match=f"has {value:g} in column 'always', row 7 .* and 2 such values"):
        table(save(data, file), "kind")


def test_missing_value_in_parquet_is_named(tmp_path: Path) -> None:
    data = frame().astype({"height": "Int64"})
    data.loc[3, "height"] = pandas.NA
    data.to_parquet(tmp_path / "fruit.parquet")
    with pytest.raises(InputError, match="has nan in column 'height', row 3"):
        table(tmp_path / "fruit.parquet", "kind")


def test_missing_label_is_named(file: Path) -> None:
    data = frame()
    data.loc[5, "kind"] = None
    with pytest.raises(InputError, match="no value in the label column 'kind', row 5"):
        table(save(data, file), "kind")


def test_fractional_labels_are_refused(file: Path) -> None:
    with pytest.raises(InputError, match="'always' of .* has fractional numbers"):
        table(save(frame(), file), "always", features=["height"])


def test_one_class_is_refused(file: Path) -> None:
    with pytest.raises(InputError, match="has one value only, 'pear'"):
        table(save(frame().assign(kind="pear"), file), "kind")


def test_table_without_rows_is_refused(file: Path) -> None:
    with pytest.raises(InputError, match="has no rows"):
        table(save(frame(0), file), "kind")


def test_files_that_are_no_tables_are_refused(tmp_path: Path, file: Path) -> None:
    with pytest.raises(StoreError, match="there is no file"):
        table(file, "kind")
    file.touch()
    with pytest.raises(StoreError, match="cannot be read as a table"):
        table(file, "kind")
    (tmp_path / "fruit.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreError, match="cannot be read as a table"):
        table(tmp_path / "fruit.parquet", "kind")
    with pytest.raises(InputError, match=r"a \.csv or \.parquet file, found .*fruit\.xlsx"):
        table(tmp_path / "fruit.xlsx", "kind")


def test_says_which_extra_is_missing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"table needs pandas.*transfuse\[data\]"):
        table(file, "kind")

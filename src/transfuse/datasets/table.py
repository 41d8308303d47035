"""Tables with a column to predict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from transfuse.core.errors import InputError, MissingExtraError, StoreError, nearest
from transfuse.datasets.splits import Splits, stratified

if TYPE_CHECKING:
    from pandas import DataFrame, Series


def table(
    path: str | Path,
    label: str,
    features: Sequence[str] | None = None,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    standardize: bool = True,
) -> Splits:
    """A CSV or Parquet file, one sample per row: inputs float32 `(features,)`, labels 0, 1, ...

    The values of the label column, in sorted order, are the classes. Rows are split at random, each class
    by the same fractions.

    Args:
        path: `.csv` or `.parquet`.
        label: the column with the class.
        features: the columns to predict from; None takes all others.
        fractions: train, validate and test; a fraction of 0 leaves the part out.
        seed: of the random split.
        standardize: shift and scale every feature to mean 0 and deviation 1 over the train rows; a feature
            that is constant there becomes 0.

    Raises:
        StoreError: the file is missing or cannot be read.
        InputError: an unknown column, a feature that is not numeric, a value that is missing or infinite,
            fewer than two classes, labels that are fractional numbers, no rows, or wrong `fractions`.
        MissingExtraError: pandas is not installed.
    """
    path = Path(path)
    frame = read(path)
    if features is None:
        features = [column for column in frame.columns if column != label]
    check_columns(frame, label, features, path)
    values = numbers(frame, features, path)
    labels, classes = encode(frame[label], path)
    parts = stratified(labels, fractions, seed)
    if standardize:
        values = standardized(values, by=values[parts[0]])
    inputs = values.float()
    train, validate, test = (TensorDataset(inputs[part], labels[part]) for part in parts)
    return Splits(train, validate or None, test or None, classes, path.stem)


def read(path: Path) -> DataFrame:
    """The table in a file."""
    try:
        import pandas
    except ImportError as error:
        raise MissingExtraError("pandas", "data", "table") from error
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"a table is a .csv or .parquet file, found {path}")
    if not path.is_file():
        raise StoreError(f"there is no file {path}")
    try:
        if path.suffix == ".parquet":
            return pandas.read_parquet(path)
        # Types are found from whole columns, or one column could hold both 1 and "1".
        return pandas.read_csv(path, low_memory=False)
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data", "reading Parquet") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as a table: {error}") from error


def check_columns(frame: DataFrame, label: str, features: Sequence[str], path: Path) -> None:
    """Refuse tables without rows, unknown columns, and features that are not numbers."""
    from pandas.api.types import is_numeric_dtype

    if len(frame) == 0:
        raise InputError(f"{path} has no rows")
    for column in (label, *features):
        if column not in frame.columns:
            raise InputError(f"{path} has no column {column!r}; {nearest(column, frame.columns)}")
    if not features or label in features:
        raise InputError(f"features are the columns other than the label {label!r}, found {list(features)}")
    for column in features:
        if not is_numeric_dtype(frame[column].dtype):
            raise InputError(
                f"the feature {column!r} of {path} is not numeric (for example {frame[column].iloc[0]!r}): "
                "encode it as numbers, or leave it out with features="
            )


def numbers(frame: DataFrame, features: Sequence[str], path: Path) -> Tensor:
    """The features as float64 `(rows, features)`, all finite."""
    values = torch.from_numpy(frame[list(features)].to_numpy("float64", copy=True, na_value=float("nan")))
    bad = torch.nonzero(~values.isfinite())
    if len(bad):
        row, column = bad[0].tolist()
        raise InputError(
            f"{path} has {values[row, column]:g} in column {features[column]!r}, row {row} (the first is 0), "
            f"and {len(bad)} such values in all: fill them or remove their rows"
        )
    return values


def encode(column: Series, path: Path) -> tuple[Tensor, tuple[str, ...]]:
    """Labels `(rows,)` as 0, 1, ... and the classes they stand for."""
    from pandas.api.types import is_float_dtype

    missing = column.isna().to_numpy().nonzero()[0]
    if len(missing):
        raise InputError(
            f"{path} has no value in the label column {column.name!r}, row {missing[0]} (the first is 0), "
            f"and {len(missing)} such rows in all: remove them"
        )
    if is_float_dtype(column.dtype) and (column % 1 != 0).any():
        raise InputError(f"the label column {column.name!r} of {path} has fractional numbers: these are no classes")
    codes, values = column.factorize(sort=True)
    if len(values) < 2:
        raise InputError(
            f"the label column {column.name!r} of {path} has one value only, {values[0]!r}: "
            "at least two classes are needed"
        )
    return torch.tensor(codes, dtype=torch.int64), tuple(str(value) for value in values)


def standardized(values: Tensor, by: Tensor) -> Tensor:
    """Shift and scale `(rows, features)` so that the rows `by` have mean 0 and deviation 1."""
    # Compared with the first row, not with a deviation of 0, which rounding can miss.
    constant = (by == by[0]).all(dim=0)
    centred = (values - by.mean(dim=0)) / by.std(dim=0, correction=0)
    return torch.where(constant, 0, centred)

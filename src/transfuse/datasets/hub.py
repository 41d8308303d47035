"""Data sets of the Hugging Face `datasets` library, already on this machine.

Nothing is downloaded: whoever wants data from the hub calls `datasets.load_dataset` and passes the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from transfuse.core.errors import InputError, MissingExtraError, ShapeError, StoreError, nearest
from transfuse.datasets.splits import Splits, check_labels

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

PARTS = {"train": "train", "validation": "validate", "validate": "validate", "test": "test"}


def hf_dataset(
    source: str | Path | Dataset | DatasetDict,
    columns: Mapping[str, str] | None = None,
    label: str | None = "label",
    task: str = "classification",
) -> Splits:
    """A Hugging Face data set whose samples are dicts of tensors, with the label under `"labels"`.

    Args:
        source: a folder that `save_to_disk` wrote, or a loaded data set. A single `Dataset` is the train
            part; a `DatasetDict` has `train` and perhaps `validation` (or `validate`) and `test`.
        columns: which columns to keep and what to call them, as the model's arguments are called:
            `{"tokens": "input_ids"}`; None keeps all under their own names.
        label: the column of class numbers; None for data without classes. Class names come from its
            `ClassLabel`; plain integers are named "0", "1", ...
        task: what the data set is for, see :class:`Splits`.

    Raises:
        StoreError: no such folder, or no data set in it.
        InputError: `source` is something else, a part or column is unknown, or labels are not class numbers.
        ShapeError: two parts name their classes differently.
        MissingExtraError: datasets is not installed.
    """
    loaded = load(source)
    parts: dict[str, Dataset] = {}
    for name, part in loaded.items():
        role = PARTS.get(name)
        if role is None or role in parts:
            raise InputError(
                f"the parts of a data set are train, validation and test, found {sorted(loaded)}: "
                f"remove or rename {name!r} in the DatasetDict"
            )
        parts[role] = part
    if "train" not in parts:
        raise InputError(f"the data set has no train part, found {sorted(loaded)}")
    selected = {role: select(part, columns, label) for role, part in parts.items()}
    classes = None if label is None else find_classes(selected)
    name = Path(source).name if isinstance(source, str | Path) else parts["train"].info.dataset_name or "hf"
    return Splits(selected["train"], selected.get("validate"), selected.get("test"), classes, name, task)


def load(source: str | Path | Dataset | DatasetDict) -> Mapping[str, Dataset]:
    """The parts of a data set by name."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "hf", "hf_dataset") from error
    if isinstance(source, str | Path):
        # Asked first, since `datasets` would take other strings for addresses.
        if not Path(source).is_dir():
            raise StoreError(f"there is no folder {source}: hf_dataset reads what save_to_disk wrote")
        try:
            source = datasets.load_from_disk(str(source))
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"{source} holds no data set that save_to_disk wrote: {error}") from error
    if isinstance(source, datasets.Dataset):
        return {"train": source}
    if isinstance(source, datasets.DatasetDict):
        return source
    raise InputError(f"expected a folder, a Dataset or a DatasetDict, found {type(source).__name__}")


def select(part: Dataset, columns: Mapping[str, str] | None, label: str | None) -> Dataset:
    """The wanted columns under their new names, as tensors."""
    names = dict(columns) if columns is not None else {c: c for c in part.column_names}
    if label is not None:
        names[label] = "labels"
    for column in names:
        if column not in part.column_names:
            raise InputError(f"the data set has no column {column!r}; {nearest(column, part.column_names)}")
    if len(set(names.values())) < len(names):
        raise InputError(f"two columns would get the same name: {names}; choose others with columns=")
    renamed = {old: new for old, new in names.items() if old != new}
    return part.select_columns(list(names)).rename_columns(renamed).with_format("torch")


def find_classes(parts: Mapping[str, Dataset]) -> tuple[str, ...]:
    """The class names that all parts agree on, after a look at every label."""
    from datasets import ClassLabel

    labels = {role: read_labels(part, role) for role, part in parts.items()}
    features = [part.features["labels"] for part in parts.values()]
    if all(isinstance(f, ClassLabel) for f in features):
        classes = tuple(features[0].names)
        for role, feature in zip(parts, features, strict=True):
            if tuple(feature.names) != classes:
                raise ShapeError(f"parts name their classes differently: {classes}, and in {role} {feature.names}")
    else:
        highest = max(int(found.max()) for found in labels.values())
        classes = tuple(str(c) for c in range(highest + 1))
    for role, found in labels.items():
        check_labels(found, len(classes), f"the {role} part")
    return classes


def read_labels(part: Dataset, role: str) -> torch.Tensor:
    """All labels of a part, `(samples,)`."""
    if len(part) == 0:
        raise InputError(f"the {role} part is empty")
    found = part.with_format(None)["labels"][:]
    if not all(isinstance(value, int) for value in found):
        odd = next(value for value in found if not isinstance(value, int))
        raise InputError(
            f"the labels of the {role} part must be class numbers, found {odd!r}: encode them with "
            "class_encode_column, or give label=None and keep the column through columns="
        )
    return torch.tensor(found)

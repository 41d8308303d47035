"""Handwritten digits, 8x8, that come with scikit-learn."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

from transfuse.core.errors import MissingExtraError
from transfuse.datasets.splits import Splits, stratified

SPLIT_SEED = 1797


def digits(labels: int | None = None, seed: int = 0) -> Splits:
    """1,797 digits: inputs float32 `(1, 8, 8)` in [0, 1], labels 0 to 9.

    (Alpaydin and Kaynak, UCI repository, 1998.) The split into 1,078 train, 269 validate and 450 test samples
    is stratified and always the same.

    Args:
        labels: keep this many labels in train; None keeps all. See :meth:`Splits.few_labels`.
        seed: chooses the labels that are kept.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "data", "digits") from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    targets = torch.tensor(data.target, dtype=torch.int64)
    train, validate, test = (
        TensorDataset(images[part], targets[part]) for part in stratified(targets, (0.6, 0.15, 0.25), SPLIT_SEED)
    )
    splits = Splits(train, validate, test, tuple(str(d) for d in range(10)), "digits")
    return splits if labels is None else splits.few_labels(labels, seed)

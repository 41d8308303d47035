from __future__ import annotations

import argparse
import gzip
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from transfuse.core.errors import InputError, MissingExtraError, StoreError
from transfuse.datasets import byte_text, digits, fashion_mnist, load
from transfuse.datasets.fashion import DEBIAN
from transfuse.losses.reduction import IGNORE


def tensors(part: Dataset[Any] | None) -> tuple[Tensor, ...]:
    assert isinstance(part, TensorDataset)
    return part.tensors


class TestDigits:
    def test_has_every_digit_of_scikit_learn_once(self) -> None:
        from sklearn.datasets import load_digits

        splits = digits()
        inputs = torch.cat([tensors(p)[0] for p in (splits.train, splits.validate, splits.test)])
        found = sorted(map(tuple, (inputs.flatten(1) * 16).long().tolist()))
        assert found == sorted(map(tuple, load_digits().data.astype(int).tolist()))

    def test_is_as_documented(self) -> None:
        splits = digits()
        assert [len(tensors(p)[1]) for p in (splits.train, splits.validate, splits.test)] == [1078, 269, 450]
        inputs, labels = tensors(splits.train)
        assert inputs.shape[1:] == (1, 8, 8)
        assert (inputs.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert (inputs.min(), inputs.max()) == (0, 1)
        assert splits.classes == ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")

    def test_split_never_changes(self) -> None:
        assert tensors(digits(labels=50, seed=3).test)[1].equal(tensors(digits().test)[1])
        assert tensors(digits().train)[1][:10].tolist() == [3, 9, 7, 8, 4, 6, 0, 8, 4, 2]

    def test_fifty_labels_are_five_of_each_class(self) -> None:
        labels = tensors(load("digits", labels=50, seed=1).train)[1]
        assert labels[labels != IGNORE].bincount().tolist() == [5] * 10

    def test_says_which_extra_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(MissingExtraError, match=r"digits needs scikit-learn.*transfuse\[data\]"):
            digits()


def idx(values: Tensor) -> bytes:
    sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
    return bytes([0, 0, 8, values.dim()]) + sizes + bytes(values.flatten().tolist())


@pytest.fixture
def clothes(tmp_path: Path) -> Path:
    """240 tiny training pictures, 20 test pictures; the first pixel is the label."""
    for part, count in (("train", 240), ("t10k", 20)):
        labels = torch.arange(count) % 10
        images = torch.zeros(count, 2, 3, dtype=torch.uint8)
        images[:, 0, 0] = labels
        images[:, 1, 2] = 255
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    return tmp_path


class TestFashionMnist:
    def test_reads_images_with_their_labels(self, clothes: Path) -> None:
        splits = fashion_mnist(clothes)
        for part, count in ((splits.train, 220), (splits.validate, 20), (splits.test, 20)):
            inputs, labels = tensors(part)
            assert inputs.shape == (count, 1, 2, 3)
            assert torch.equal((inputs[:, 0, 0, 0] * 255).round().long(), labels)
            assert (inputs[:, 0, 1, 2] == 1).all()

    def test_size_takes_the_first_of_the_same_order(self, clothes: Path) -> None:
        whole, cut = fashion_mnist(clothes), fashion_mnist(clothes, size=30)
        assert torch.equal(tensors(cut.train)[1], tensors(whole.train)[1][:30])
        assert torch.equal(tensors(cut.validate)[1], tensors(whole.validate)[1])

    def test_labels_are_kept_among_the_first(self, clothes: Path) -> None:
        labels = tensors(fashion_mnist(clothes, size=100, labels=20).train)[1]
        assert len(labels) == 100
        assert labels[labels != IGNORE].bincount().tolist() == [2] * 10

    @pytest.mark.parametrize("size", [0, 221])
    def test_refuses_a_size_that_is_not_there(self, clothes: Path, size: int) -> None:
        with pytest.raises(InputError, match=f"between 1 and 220 training pictures, found {size}"):
            fashion_mnist(clothes, size=size)

    def test_missing_files_say_what_to_install(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="there is no .*train-images.*apt install dataset-fashion-mnist"):
            fashion_mnist(tmp_path)

    def test_truncated_file_is_named(self, clothes: Path) -> None:
        file = clothes / "train-images-idx3-ubyte.gz"
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(StoreError, match="train-images-idx3-ubyte.gz cannot be read"):
            fashion_mnist(clothes)

    def test_uncompressed_file_is_named(self, clothes: Path) -> None:
        file = clothes / "t10k-labels-idx1-ubyte.gz"
        file.write_bytes(gzip.decompress(file.read_bytes()))
        with pytest.raises(StoreError, match="t10k-labels-idx1-ubyte.gz cannot be read"):
            fashion_mnist(clothes)

    def test_swapped_files_are_found_by_their_magic_number(self, clothes: Path) -> None:
        labels = (clothes / "train-labels-idx1-ubyte.gz").read_bytes()
        (clothes / "train-images-idx3-ubyte.gz").write_bytes(labels)
        with pytest.raises(StoreError, match="begins with 00000803, found 00000801"):
            fashion_mnist(clothes)

    def test_missing_bytes_are_found_by_the_sizes(self, clothes: Path) -> None:
        file = clothes / "train-images-idx3-ubyte.gz"
        file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1]))
        with pytest.raises(StoreError, match="promises 240 x 2 x 3 bytes and holds 1439"):
            fashion_mnist(clothes)

    def test_images_and_labels_must_be_equally_many(self, clothes: Path) -> None:
        (clothes / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(torch.zeros(7, dtype=torch.uint8))))
        with pytest.raises(StoreError, match="240 train images but 7 train labels"):
            fashion_mnist(clothes)

    def test_labels_must_be_classes(self, clothes: Path) -> None:
        (clothes / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(torch.full((20,), 10))))
        with pytest.raises(InputError, match="must be 0 to 9 .* found 10"):
            fashion_mnist(clothes)

    @pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs apt install dataset-fashion-mnist")
    def test_real_data_is_as_documented(self) -> None:
        splits = fashion_mnist()
        parts = [tensors(p) for p in (splits.train, splits.validate, splits.test)]
        assert [p[0].shape for p in parts] == [(n, 1, 28, 28) for n in (55_000, 5_000, 10_000)]
        assert [p[1].bincount().tolist() for p in parts] == [[5_500] * 10, [500] * 10, [1_000] * 10]
        assert parts[0][1][:10].tolist() == [0, 7, 8, 6, 5, 8, 4, 3, 5, 6]
        # Known of this data: the first test picture is an ankle boot; the pixels' mean and deviation.
        assert parts[2][1][0] == 9
        assert parts[0][0].mean().item() == pytest.approx(0.286, abs=1e-3)
        assert parts[0][0].std().item() == pytest.approx(0.353, abs=1e-3)


class TestByteText:
    def test_windows_are_the_text_in_order(self, tmp_path: Path) -> None:
        text = bytes(range(256)) * 2
        (tmp_path / "a").write_bytes(text[:300])
        (tmp_path / "b").write_bytes(text[300:] + b"rest")
        splits = byte_text([tmp_path / "a", tmp_path / "b"], context=32, fractions=(0.5, 0.25, 0.25))
        windows = [tensors(p)[0] for p in (splits.train, splits.validate, splits.test)]
        assert [w.shape for w in windows] == [(8, 32), (4, 32), (4, 32)]
        assert bytes(torch.cat(windows).flatten().tolist()) == text
        assert windows[0].dtype == torch.int64

    def test_default_is_python_source(self) -> None:
        splits = byte_text()
        train = tensors(splits.train)[0]
        assert train.shape[1] == 128
        assert train.numel() > 1_000_000
        assert bytes(train[:200].flatten().tolist()) == Path(argparse.__file__).read_bytes()[: 200 * 128]
        assert splits.task == "language-model"

    def test_one_file_needs_no_list(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("é" * 100, encoding="utf-8")
        splits = load("text", files=str(tmp_path / "a.txt"), context=4, fractions=[1, 0, 0])
        assert tensors(splits.train)[0].shape == (50, 4)
        assert splits.validate is None and splits.test is None

    def test_refuses_text_that_is_too_short(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"x" * 300)
        with pytest.raises(InputError, match="300 bytes are 2 windows of 128, too few"):
            byte_text([tmp_path / "a"])

    def test_refuses_empty_windows(self) -> None:
        with pytest.raises(InputError, match="at least 1 byte, found 0"):
            byte_text(context=0)

    def test_names_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="none.txt cannot be read"):
            byte_text([tmp_path / "none.txt"])

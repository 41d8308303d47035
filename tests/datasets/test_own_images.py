from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from transfuse.core.errors import InputError, MissingExtraError, ShapeError, StoreError
from transfuse.datasets import image_folder
from transfuse.datasets.folder import ImageFolder


def draw(folder: Path, count: int, colour: tuple[int, int, int], size: tuple[int, int] = (6, 4)) -> None:
    """Images of one colour with a black pixel in the top right corner; `size` is (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = Image.new("RGB", size, colour)
        image.putpixel((size[0] - 1, 0), (0, 0, 0))
        image.save(folder / f"{i}.png")


@pytest.fixture
def loose(tmp_path: Path) -> Path:
    draw(tmp_path / "red", 20, (255, 0, 51))
    draw(tmp_path / "blue", 20, (0, 0, 255))
    return tmp_path


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    for part, count in (("train", 3), ("validate", 2), ("test", 1)):
        draw(tmp_path / part / "red", count, (255, 0, 51))
        draw(tmp_path / part / "blue", count, (0, 0, 255))
    return tmp_path


def images(part: Dataset[Any] | None) -> ImageFolder:
    assert isinstance(part, ImageFolder)
    return part


def test_images_are_floats_with_channels_first(cut: Path) -> None:
    splits = image_folder(cut)
    image, label = images(splits.train)[3]
    assert splits.classes == ("blue", "red")
    assert label == 1
    assert image.dtype == torch.float32
    assert image.shape == (3, 4, 6)
    torch.testing.assert_close(image[:, 3, 2], torch.tensor([1.0, 0.0, 0.2]))
    assert (image[:, 0, 5] == 0).all()


def test_layout_with_parts_is_taken_as_it_is(cut: Path) -> None:
    splits = image_folder(cut)
    assert [len(images(p)) for p in (splits.train, splits.validate, splits.test)] == [6, 4, 2]
    assert {f.parts[-3] for f in images(splits.validate).files} == {"validate"}


def test_parts_other_than_train_may_be_absent(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "a", 1, (1, 1, 1))
    draw(tmp_path / "train" / "b", 1, (1, 1, 1))
    splits = image_folder(tmp_path)
    assert splits.validate is None and splits.test is None


def test_layout_without_parts_is_split_within_classes(loose: Path) -> None:
    splits = image_folder(loose, fractions=(0.5, 0.3, 0.2))
    parts = [images(p) for p in (splits.train, splits.validate, splits.test)]
    assert [torch.tensor(p.labels).bincount().tolist() for p in parts] == [[10, 10], [6, 6], [4, 4]]
    assert sorted(f for p in parts for f in p.files) == sorted(loose.glob("*/*.png"))
    assert all(
        splits.classes and f.parent.name == splits.classes[n]
        for f, n in zip(parts[0].files, parts[0].labels, strict=True)
    )


def test_split_is_drawn_by_the_seed(loose: Path) -> None:
    first, again, other = (set(images(image_folder(loose, seed=s).train).files) for s in (0, 0, 1))
    assert first == again != other


def test_a_fraction_of_zero_leaves_the_part_out(loose: Path) -> None:
    assert image_folder(loose, fractions=(0.8, 0, 0.2)).validate is None


def test_class_named_train_is_a_class(tmp_path: Path) -> None:
    draw(tmp_path / "plane", 10, (1, 1, 1))
    draw(tmp_path / "train", 10, (1, 1, 1))
    assert image_folder(tmp_path).classes == ("plane", "train")


def test_size_and_channels_convert_images(loose: Path) -> None:
    draw(loose / "red", 1, (255, 0, 51), size=(9, 9))
    train = images(image_folder(loose, size=8, channels=1).train)
    batch, labels = next(iter(DataLoader(train, batch_size=len(train))))
    assert batch.shape == (28, 1, 8, 8)
    # ITU-R 601 luma of the two colours.
    grey = torch.tensor([0.114, 0.299 + 0.114 * 0.2])[labels]
    torch.testing.assert_close(batch[:, 0, 7, 0], grey, atol=1 / 255, rtol=0)


def test_images_are_read_when_asked_for(loose: Path) -> None:
    splits = image_folder(loose)
    (train := images(splits.train)).files[0].write_bytes(b"no image")
    assert train[1][0].shape == (3, 4, 6)
    with pytest.raises(StoreError, match=f"{train.files[0].name} cannot be read as an image"):
        train[0]


def test_truncated_image_is_named(loose: Path) -> None:
    train = images(image_folder(loose).train)
    train.files[0].write_bytes(train.files[0].read_bytes()[:45])
    with pytest.raises(StoreError, match=f"{train.files[0].name} cannot be read as an image"):
        train[0]


def test_image_of_another_size_is_named(loose: Path) -> None:
    train = images(image_folder(loose).train)
    Image.new("RGB", (5, 5)).save(train.files[2])
    assert train[0][0].shape == (3, 4, 6)
    with pytest.raises(ShapeError, match=r"\.png has shape \(3, 5, 5\), other images have \(3, 4, 6\): give size="):
        train[2]


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no folder .*none"):
        image_folder(tmp_path / "none")


def test_fewer_than_two_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least two classes, found 0 folders"):
        image_folder(tmp_path)
    draw(tmp_path / "only", 3, (1, 1, 1))
    with pytest.raises(InputError, match="at least two classes, found 1 folders"):
        image_folder(tmp_path)


def test_class_without_images_is_named(loose: Path) -> None:
    (loose / "green").mkdir()
    (loose / "green" / "notes.txt").touch()
    with pytest.raises(InputError, match="the class folder .*green has no images"):
        image_folder(loose)


def test_parts_with_different_classes_are_refused(cut: Path) -> None:
    draw(cut / "test" / "green", 1, (0, 255, 0))
    with pytest.raises(InputError, match=r"same class folders, differ in \['green'\]"):
        image_folder(cut)


def test_misnamed_part_is_refused(cut: Path) -> None:
    (cut / "validate").rename(cut / "validation")
    with pytest.raises(InputError, match="validation is no part of a data set; did you mean 'validate'"):
        image_folder(cut)


def test_other_channel_counts_are_refused(loose: Path) -> None:
    with pytest.raises(InputError, match=r"channels is 1 \(grey\) or 3 \(colour\), found 4"):
        image_folder(loose, channels=4)


def test_says_which_extra_is_missing(loose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"image_folder needs pillow.*transfuse\[data\]"):
        image_folder(loose)

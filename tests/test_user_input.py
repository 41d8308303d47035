"""What users hand in, as it is: data of many forms, models of many kinds, and mistakes, answered before training."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import CLASSES, CNN, images
from transfuse import Transfer, transfer
from transfuse.core.errors import InputError, ShapeError, StoreError, TransferError
from transfuse.core.files import file_name
from transfuse.datasets import digits
from transfuse.distill import KD, Hints, Labels
from transfuse.experiment import Result

PICTURES, _ = images(24)
DIGITS = torch.arange(24) % CLASSES


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.fc((left + right).flatten(1))


def distil(data: Any = (PICTURES, DIGITS), **options: Any) -> Result:
    return transfer(KD(), **{"source": CNN(8), "target": CNN(2), "data": data, "steps": 2, "batch_size": 8, **options})


def resume(out: Path, source: nn.Module | None = None, data: Any = (PICTURES, DIGITS)) -> Result:
    transfer = Transfer(KD(), source or CNN(8), CNN(2), data, steps=2, batch_size=8, out=out)
    return transfer.run(resume=True)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.bool])
def test_labels_may_be_of_any_integer_type(kind: torch.dtype) -> None:
    labels = (DIGITS % 2).to(kind)
    expected = distil((PICTURES, DIGITS % 2), test=(PICTURES, DIGITS % 2))
    result = distil((PICTURES, labels), test=(PICTURES, labels))
    assert torch.equal(result.model.fc.weight, expected.model.fc.weight)
    assert result.report.arms[0].value == expected.report.arms[0].value


def test_labels_that_are_no_class_indices_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"float32: use labels.long\(\)"):
        distil((PICTURES, DIGITS.float()))


@pytest.mark.parametrize(
    "data",
    [
        {"left": PICTURES, "right": PICTURES, "label": DIGITS},
        {"inputs": {"left": PICTURES, "right": PICTURES}, "labels": DIGITS},
    ],
    ids=["flat", "nested"],
)
def test_a_mapping_of_several_inputs_is_one_data_set(data: dict[str, Any]) -> None:
    result = distil(data, source=TwoInputs(), target=TwoInputs(), test=data, compare=["scratch"])
    assert [arm.name for arm in result.report.arms] == ["KD()", "scratch"]


def test_arrays_are_read_as_tensors() -> None:
    expected = distil()
    assert torch.equal(distil((PICTURES.numpy(), DIGITS.numpy())).model.fc.weight, expected.model.fc.weight)


def test_data_sets_with_names_that_no_method_reads_are_refused() -> None:
    with pytest.raises(InputError, match="named train"):
        distil({"train": (PICTURES, DIGITS)})


def test_a_compiled_model_is_a_model() -> None:
    compiled = torch.compile(CNN(2), backend="eager")
    result = distil(target=compiled, test=(PICTURES, DIGITS), compare=["scratch"])
    assert type(result.model) is type(compiled)


def test_a_compiled_pair_learns_what_a_plain_one_does() -> None:
    source, target, method = CNN(8), CNN(2), KD() + 0.5 * Hints("layer2", "layer2")
    options: dict[str, Any] = {"data": (PICTURES, DIGITS), "test": (PICTURES, DIGITS), "steps": 3, "batch_size": 8}
    plain = transfer(method, source, target, **options)
    compiled = [torch.compile(copy.deepcopy(m), backend="aot_eager") for m in (source, target)]
    result = transfer(method, *compiled, **options)
    for ours, theirs in zip(result.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_data_in_which_nothing_counts_is_an_error() -> None:
    with pytest.raises(InputError, match="nothing in 3 updates counted"):
        transfer(Labels(), target=CNN(2), data=(PICTURES, torch.full((24,), -100)), epochs=2, batch_size=8)


def test_an_iterator_for_several_arms_is_refused_before_training() -> None:
    batches = iter([(PICTURES, DIGITS)])
    with pytest.raises(InputError, match="read only once, for 2 arms"):
        distil(batches, test=(PICTURES, DIGITS), compare=["scratch"])


def test_all_splits_at_once_are_refused() -> None:
    with pytest.raises(InputError, match=r"splits\.train"):
        distil(digits())


@pytest.mark.parametrize("device", ["gpu", "cuda:77"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(InputError, match=device):
        distil(device=device)


@pytest.mark.parametrize("part", ["validate", "test"])
@pytest.mark.parametrize(
    "held_out",
    [
        (PICTURES[:, :, :2, :2].repeat(1, 3, 1, 1), DIGITS),
        (PICTURES, DIGITS[:, None]),
        (PICTURES, DIGITS.float()),
        (PICTURES, torch.where(torch.arange(24) < 20, DIGITS, CLASSES)),
    ],
    ids=["channels", "label shape", "label type", "label range"],
)
def test_held_out_data_that_does_not_fit_is_refused_before_training(part: str, held_out: Any) -> None:
    updates: list[Any] = []
    with pytest.raises(TransferError, match=part):
        transfer(
            Labels(),
            target=CNN(2),
            data=(PICTURES, DIGITS),
            steps=1,
            batch_size=8,
            listener=lambda *update: updates.append(update),
            **{part: held_out},
        )
    assert not updates


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": "2"}, "must be a number"),
        ({"seeds": 3}, "list of whole numbers"),
        ({"seeds": [0.5]}, "list of whole numbers"),
        ({"compare": "scratch"}, "expected a list"),
        ({"compare": [None]}, "names of arms"),
    ],
    ids=str,
)
def test_arguments_of_a_wrong_kind_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        distil(test=(PICTURES, DIGITS), **options)


def test_an_output_folder_that_cannot_be_made_is_an_error_before_training(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        with pytest.raises(StoreError, match="cannot make the folder"):
            distil(out=out)
    with pytest.raises(StoreError, match="cannot make the folder"):
        distil().save(file)
    assert file.read_text() == "mine"


def test_names_of_folders_are_short_and_different() -> None:
    names = ["KD()", "KD()" + "+ KD()" * 99, "KD()" + "+ KD()" * 98, "Hints('é')", "Hints('è')"]
    folders = [file_name(name) for name in names]
    assert folders[0] == "kd"
    assert len(set(folders)) == len(names)
    assert max(map(len, folders)) < 128


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("arms/kd/seed-0/model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:40]), "Remove .*seed-0"),
        ("arms/kd/seed-0/run.safetensors", lambda path: path.write_bytes(b""), "Remove .*seed-0"),
        ("transfer.json", lambda path: path.write_text(json.dumps({})[:1]), "remove it"),
    ],
    ids=["model", "run", "claim"],
)
def test_damaged_files_of_a_run_are_named_with_the_way_out(
    tmp_path: Path, file: str, damage: Callable[[Path], Any], says: str
) -> None:
    distil(out=tmp_path)
    damage(tmp_path / file)
    with pytest.raises(StoreError, match=says):
        resume(tmp_path)


def test_a_run_is_resumed_with_the_data_and_the_source_that_it_had(tmp_path: Path) -> None:
    distil(out=tmp_path)
    with pytest.raises(InputError, match="other .* data or source"):
        resume(tmp_path, data=(PICTURES[:16], DIGITS[:16]))
    with pytest.raises(InputError, match="other .* data or source"):
        resume(tmp_path, source=CNN(8, seed=1))
    assert resume(tmp_path).report.verdict == "not compared"


def test_a_flipped_bit_in_the_weights_of_a_finished_arm_is_noticed(tmp_path: Path) -> None:
    distil(out=tmp_path)
    path = tmp_path / "arms/kd/seed-0/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="was altered"):
        resume(tmp_path)


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        distil().save(tmp_path / name)
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b", "c", "d")}) == 1

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from transfuse.core.errors import InputError
from transfuse.datasets.messages import FEWEST, messages


def write_catalogue(folder: Path, pairs: dict[str, str]) -> Path:
    """A minimal .mo file: header, two tables of (length, offset), then the strings."""
    items = sorted(
        (k.encode(), v.encode()) for k, v in {"": "Content-Type: text/plain; charset=UTF-8\n", **pairs}.items()
    )
    count, offset, tables, strings = len(items), 28 + 16 * len(items), [], b""
    for side in (0, 1):
        for item in items:
            tables.append(struct.pack("<II", len(item[side]), offset + len(strings)))
            strings += item[side] + b"\0"
    folder.mkdir(parents=True, exist_ok=True)
    header = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, offset)
    (folder / "program.mo").write_bytes(header + b"".join(tables) + strings)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("locale")
    write_catalogue(root / "xx" / "LC_MESSAGES", {f"message {i}": f"annonce {i}" for i in range(FEWEST)})
    return root


def text(row: torch.Tensor) -> str:
    return bytes(row[row > 0].tolist()).decode()


def test_the_four_pools_have_rows_of_one_length(folder):
    splits = messages("xx", context=40, folder=folder)
    for part in (splits.train, splits.validate, splits.test):
        assert set(part) == {"english", "foreign", "parallel", "questions"}
        for rows in part.values():
            assert {t.shape[1] for t in rows.values()} == {40}
    assert splits.task == "language-model"


def test_parts_share_no_message(folder):
    splits = messages("xx", context=40, folder=folder)
    asked = [
        {text(row).split(" ?")[0] for row in part["questions"]["input_ids"]}
        for part in (splits.train, splits.validate, splits.test)
    ]
    assert sum(map(len, asked)) == len(set().union(*asked)) == FEWEST


def test_only_the_answer_of_a_question_has_labels(folder):
    rows = messages("xx", context=40, folder=folder).train["questions"]
    for tokens, labels in list(zip(rows["input_ids"], rows["labels"], strict=True))[:50]:
        prompt, answer = text(tokens).split(" ?\n")
        assert text(labels.clamp(min=0)) == answer
        assert answer == prompt.replace("message", "annonce") + "\n"
        assert bool((labels[: len(prompt) + 3] == -100).all())


def test_pairs_stand_in_either_order(folder):
    rows = messages("xx", context=40, folder=folder).train["parallel"]["input_ids"]
    first = sum(text(row).startswith("message") for row in rows) / len(rows)
    assert 0.4 < first < 0.6


def test_padding_is_masked_and_never_a_label(folder):
    rows = messages("xx", context=40, folder=folder).train["parallel"]
    assert bool((rows["attention_mask"].bool() == (rows["input_ids"] > 0)).all())
    assert bool((rows["labels"][rows["attention_mask"] == 0] == -100).all())


def test_the_same_seed_gives_the_same_pools(folder):
    one, same, other = (messages("xx", context=40, folder=folder, seed=seed).train for seed in (0, 0, 1))
    assert torch.equal(one["questions"]["input_ids"], same["questions"]["input_ids"])
    assert not torch.equal(one["questions"]["input_ids"], other["questions"]["input_ids"])


def test_too_little_text_says_what_to_install(tmp_path):
    with pytest.raises(InputError, match=r"0 messages of 'yy'.*install programs with translations"):
        messages("yy", folder=tmp_path)

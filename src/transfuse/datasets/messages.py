"""Messages of programs and their translations, from the gettext catalogues on this machine: text in two languages."""

from __future__ import annotations

import gettext
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from transfuse.core.errors import InputError
from transfuse.datasets.splits import Splits, cuts
from transfuse.losses.reduction import IGNORE

CATALOGUES = Path("/usr/share/locale")
FEWEST = 2000
"""Messages below which there is too little text to learn from."""
Rows = dict[str, Tensor]
POOLS = ("english", "foreign", "parallel", "questions")


def messages(
    language: str = "fr",
    context: int = 96,
    size: int | None = None,
    seed: int = 0,
    folder: str | Path = CATALOGUES,
) -> Splits:
    """Four pools of bytes for co-training, as a dict in train, validate and test, which share no message.

    `english` and `foreign` are running text, cut into windows; `parallel` are messages with their translation, in
    either order; `questions` ask for a translation, and only the answer has labels. Samples are
    `{"input_ids", "attention_mask"}` of `context` bytes, and labels.

    Args:
        language: code of the catalogues to read.
        context: bytes per sample; longer pairs are left out.
        size: take only so many messages.
        seed: of the order of a pair, and of which message is in which part.
        folder: where catalogues lie, as `<language>/LC_MESSAGES/*.mo`.

    Raises:
        InputError: fewer than 2,000 translated messages are there; the message says what to install.
    """
    pairs = _pairs(Path(folder) / language / "LC_MESSAGES")
    if len(pairs) < FEWEST:
        raise InputError(
            f"{len(pairs)} messages of {language!r} in {folder}, {FEWEST} are needed: install programs with "
            "translations, for instance Debian's coreutils, git, gettext, bash, binutils-common and iso-codes"
        )
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pairs), generator=draw).tolist()[:size]
    begins = cuts(len(order), (0.8, 0.1, 0.1))
    parts = [[pairs[i] for i in order[a:b]] for a, b in pairwise(begins)]
    train, validate, test = ({name: _pool(name, part, context, draw) for name in POOLS} for part in parts)
    return Splits(train, validate, test, name=f"messages in English and {language}", task="language-model")


def _pairs(folder: Path) -> list[tuple[str, str]]:
    """Every message that has another translation, once, in a fixed order."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.mo")):
        with path.open("rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        for message, translated in catalogue.items():
            if isinstance(message, str) and message and translated not in ("", message):
                found.setdefault(message.strip(), translated.strip())
    return sorted(found.items())


def _pool(name: str, pairs: list[tuple[str, str]], context: int, draw: torch.Generator) -> Rows:
    if name in ("english", "foreign"):
        text = "\n".join(pair[name == "foreign"] for pair in pairs).encode()
        whole = text[: len(text) // context * context]
        windows = torch.frombuffer(bytearray(whole), dtype=torch.uint8).view(-1, context).long()
        return _rows(windows, torch.ones_like(windows), windows)
    flips = (torch.rand(len(pairs), generator=draw) < 0.5).tolist()
    rows = []
    for (english, foreign), flip in zip(pairs, flips, strict=True):
        if name == "questions":
            rows.append((f"{english} ?\n".encode(), f"{foreign}\n".encode()))
        else:
            rows.append((b"", "\t".join((foreign, english) if flip else (english, foreign)).encode() + b"\n"))
    return _padded([row for row in rows if len(row[0]) + len(row[1]) <= context], context)


def _padded(rows: list[tuple[bytes, bytes]], context: int) -> Rows:
    """Prompt and answer in one row, padded on the right; the prompt has no labels."""
    tokens, mask = torch.zeros(len(rows), context, dtype=torch.long), torch.zeros(len(rows), context, dtype=torch.long)
    labels = torch.full((len(rows), context), IGNORE)
    for i, (prompt, answer) in enumerate(rows):
        whole = torch.frombuffer(bytearray(prompt + answer), dtype=torch.uint8).long()
        tokens[i, : len(whole)], mask[i, : len(whole)] = whole, 1
        labels[i, len(prompt) : len(whole)] = whole[len(prompt) :]
    return _rows(tokens, mask, labels)


def _rows(tokens: Tensor, mask: Tensor, labels: Tensor) -> Rows:
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}

"""The same texts as two tokenizers read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from transfuse.core.errors import InputError
from transfuse.core.vocabulary import token_bytes
from transfuse.losses.reduction import mask_from_lengths


def paired_tokens(texts: Sequence[str], student: Any, teacher: Any, context: int) -> dict[str, Any]:
    """Texts tokenised twice, as data for a student and a teacher with different tokenizers.

    Args:
        texts: one per sample; cut those longer than `context` tokens before, for what goes beyond is dropped.
        student, teacher: tokenizers: of Hugging Face, of `tokenizers`, or :data:`transfuse.core.vocabulary.BYTES`.
            Special tokens that they add are kept.
        context: largest number of tokens, of either side.

    Returns:
        `inputs` and `source`, each with `input_ids` and `attention_mask` `(texts, tokens)`, padded on the right; `ends`
        and `source_ends`, the byte of the text after each token, `(texts, tokens)`; `bytes`, how many each token of the
        student has, so that bits per byte are measured, which do not depend on a tokenizer.

    Raises:
        InputError: there is no text, or the tokens of one are not its bytes (a tokenizer that changes letters, or
            knows no token for some).
    """
    if not texts or not all(texts) or context < 2:
        raise InputError(f"expected texts that are not empty and at least 2 tokens, found {len(texts)} and {context}")
    ours, ends = _read(texts, student, context)
    theirs, source_ends = _read(texts, teacher, context)
    widths = ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))
    return {"inputs": ours, "source": theirs, "ends": ends, "source_ends": source_ends, "bytes": widths}


def _read(texts: Sequence[str], tokenizer: Any, context: int) -> tuple[dict[str, Tensor], Tensor]:
    tokens, special = token_bytes(tokenizer), _special(tokenizer)
    by_token = {token: i for i, token in enumerate(tokens)}
    rows, all_ends = [], []
    for number, text in enumerate(texts):
        ids, written = _encode(tokenizer, by_token, text), text.encode()
        pieces = [b"" if i in special else tokens[i] or b"" for i in ids]
        joined = b"".join(pieces)
        added = joined == b" " + written  # SentencePiece writes a space before the first word
        if joined != written and not added:
            raise InputError(
                f"text {number} is {written[:40]!r}, its tokens are {joined[:40]!r}: chunks of bytes need a tokenizer "
                "that keeps the text as it is"
            )
        widths = torch.tensor([len(piece) for piece in pieces], dtype=torch.long)
        rows.append(torch.tensor(ids[:context], dtype=torch.long))
        all_ends.append((widths.cumsum(0) - int(added)).clamp(min=0)[:context])
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ends = torch.nn.utils.rnn.pad_sequence(all_ends, batch_first=True).cummax(1).values
    return {"input_ids": padded, "attention_mask": mask_from_lengths(lengths, padded.shape[1]).long()}, ends


def _encode(tokenizer: Any, by_token: Mapping[bytes | None, int], text: str) -> list[int]:
    if hasattr(tokenizer, "encode"):
        found = tokenizer.encode(text)
        return list(getattr(found, "ids", found))
    try:
        return [by_token[bytes([byte])] for byte in text.encode()]
    except KeyError as error:
        raise InputError(f"a list of tokens is read byte by byte, and has no token for the byte {error}") from None


def _special(tokenizer: Any) -> set[int]:
    """The ids of tokens that stand for no text."""
    if hasattr(tokenizer, "all_special_ids"):
        return set(tokenizer.all_special_ids)
    added = tokenizer.get_added_tokens_decoder() if hasattr(tokenizer, "get_added_tokens_decoder") else {}
    return {i for i, token in added.items() if token.special}

"""Conversations as samples for a language model that learns to answer: only the answers count."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from transfuse.core.errors import InputError
from transfuse.losses.reduction import IGNORE

Message = Mapping[str, str]


def chat(conversations: Sequence[Sequence[Message]], tokenizer: Any, context: int = 512) -> dict[str, Tensor]:
    """Conversations in a tokenizer's chat template: `input_ids`, `attention_mask` and `labels`, `(samples, context)`.

    Labels are on what the assistant says, in every turn, and on the token that ends it, so that the model learns to
    stop; on nothing else. They are found by rendering the conversation turn by turn, so templates need no marks for
    it. Padding is on the right and told by the mask, whatever the padding token is.

    Args:
        conversations: lists of `{"role": ..., "content": ...}`.
        tokenizer: with a chat template.
        context: tokens at most; what is longer is cut at its end. A conversation without a whole first token of an
            answer within it is left out, and counted in a warning.

    Raises:
        InputError: the tokenizer has no template, no conversation has an answer, or the template does not render the
            beginning of a conversation as it renders the whole.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"the {type(tokenizer).__name__} has no chat template: set tokenizer.chat_template")
    rows = [_row(number, talk, tokenizer) for number, talk in enumerate(conversations)]
    kept = [(ids[:context], labels[:context]) for ids, labels in rows]
    kept = [(ids, labels) for ids, labels in kept if (labels[1:] != IGNORE).any()]
    if not kept:
        raise InputError(f"none of {len(rows)} conversations has an answer of the assistant within {context} tokens")
    if len(kept) < len(rows):
        warnings.warn(
            f"{len(rows) - len(kept)} of {len(rows)} conversations have no answer and were left out", stacklevel=2
        )
    longest = max(len(ids) for ids, _ in kept)

    def padded(values: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(values, (0, longest - len(values)), value=fill)

    return {
        "input_ids": torch.stack([padded(ids, 0) for ids, _ in kept]),
        "attention_mask": torch.stack([padded(torch.ones_like(ids), 0) for ids, _ in kept]),
        "labels": torch.stack([padded(labels, IGNORE) for _, labels in kept]),
    }


def _row(number: int, talk: Sequence[Message], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """The ids of a conversation, and its labels."""

    def ids(turns: Sequence[Message], asks: bool = False) -> list[int]:
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=asks)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    whole = ids(talk)
    labels = [IGNORE] * len(whole)
    for turn, message in enumerate(talk):
        if message["role"] != "assistant":
            continue
        begin, end = ids(talk[:turn], asks=True), ids(talk[: turn + 1])
        if whole[: len(begin)] != begin or whole[: len(end)] != end:
            raise InputError(
                f"conversation {number}: the chat template renders turn {turn} otherwise when more follows (or tokens "
                "span two turns), so it cannot be told what the assistant says: pass one answer per conversation"
            )
        answer = whole[len(begin) : len(end)]
        if tokenizer.eos_token_id in answer:  # what the template writes after the end is not said by the assistant
            answer = answer[: len(answer) - answer[::-1].index(tokenizer.eos_token_id)]
        labels[len(begin) : len(begin) + len(answer)] = answer
    return torch.tensor(whole), torch.tensor(labels)

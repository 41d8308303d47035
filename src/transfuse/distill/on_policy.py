"""Texts that models write during training: prompts are cut from a batch, and answers become a batch of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.core.batch import Batch, align_tokens, real_tokens, token_ids
from transfuse.core.errors import InputError
from transfuse.core.run import Run
from transfuse.losses import IGNORE


def prompts(batch: Batch, least: int) -> tuple[Tensor, Tensor]:
    """The tokens before the first scored one of each sample, padded on the left, and where they are real.

    Args:
        batch: lined up, so position t is scored on token t + 1.
        least: tokens that a prompt has at least; what plain text, scored from its second token on, begins with.

    Raises:
        InputError: a sample is not longer than its prompt.
    """
    tokens = token_ids(batch)
    rows = []
    for row, there, scored in zip(tokens, real_tokens(batch), batch.mask, strict=True):
        first = int(scored.int().argmax()) if scored.any() else len(row) - 1
        marked = int(there[: first + 1].sum())  # 1 in plain text, which is scored from its second token on
        before = marked if marked > 1 else min(least, int(there.sum()))
        rows.append(row[there][:before])
    longest = max(map(len, rows))
    padded = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(longest, device=row.device) >= longest - len(row) for row in rows])
    return padded, mask


def written(
    role: str, batch: Batch, run: Run, prompt: int, length: int | None, end: int | None, temperature: float = 1.0
) -> Batch:
    """The batch's prompts with answers that a model writes, lined up; no gradient flows through the writing.

    Args:
        prompt, length: as for :func:`prompts` and :func:`room`. end: as for :func:`answered`.
        temperature: of the sampling.
    """
    asked, mask = prompts(batch, prompt)
    options = {"new_tokens": room(batch, mask, length), "temperature": temperature, "end": end}
    return answered(run.generate(role, asked, None if bool(mask.all()) else mask, **options), mask, end)


def answered(texts: Tensor, mask: Tensor, end: int | None) -> Batch:
    """Prompts with their answers as a batch, lined up; only answers are scored, the end token included.

    Args:
        texts: `(batch, tokens)`, prompts padded on the left and continued.
        mask: `(batch, prompt)`, where the prompts are real.
        end: the token that ends an answer; what follows it is padding. None: answers have no end.
    """
    length = mask.shape[1]
    answer = texts[:, length:]
    if end is None:
        written = torch.ones_like(answer, dtype=torch.bool)
    else:
        written = (answer == end).cumsum(1) - (answer == end).int() == 0
    real = torch.cat([mask, written], 1)
    labels = texts.masked_fill(~real, IGNORE)
    labels[:, :length] = IGNORE
    inputs = texts if bool(real.all()) else {"input_ids": texts, "attention_mask": real.long()}
    return align_tokens(Batch(inputs=inputs, labels=labels))


def room(batch: Batch, mask: Tensor, length: int | None) -> int:
    """How many tokens to write: as asked for, or as many as the batch's texts have after their prompts.

    Raises:
        InputError: prompts fill the whole text.
    """
    left = token_ids(batch).shape[1] - mask.shape[1]
    if length is None and left < 1:
        raise InputError(
            f"prompts of {mask.shape[1]} tokens leave nothing to write in texts of {token_ids(batch).shape[1]}: give "
            "length=, or a smaller prompt="
        )
    return left if length is None else length

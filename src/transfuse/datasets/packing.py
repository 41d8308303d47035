"""Short documents side by side in windows of one length, none of which sees another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from transfuse.core.errors import InputError
from transfuse.losses.reduction import IGNORE


class Packed(Dataset[dict[str, Tensor]]):
    """Documents packed into windows, for Hugging Face decoders.

    Samples have `input_ids`, `position_ids`, `attention_mask` and `labels`. Positions begin at 0 in each document, and
    the mask, `(1, context, context)`, lets a token see its own document alone; positions without the mask would not
    do, for attention looks at everything before a token. The first token of a document is nobody's target. Documents
    go into the first window with room for them, the longest first.

    Args:
        documents: token ids, `(tokens,)` each; longer ones than `context` are cut into several.
        context: tokens per window.
        dtype: of the mask, that of the model.

    Raises:
        InputError: there is no document with two tokens.
    """

    def __init__(self, documents: Sequence[Tensor], context: int, dtype: torch.dtype = torch.float32):
        pieces = [piece for document in documents for piece in document.split(context) if len(piece) > 1]
        if not pieces:
            raise InputError("a document has at least two tokens: there is none to pack")
        self.context, self.dtype = context, dtype
        self.windows: list[list[Tensor]] = []
        left: list[int] = []
        for piece in sorted(pieces, key=len, reverse=True):
            at = next((i for i, room in enumerate(left) if room >= len(piece)), len(left))
            if at == len(left):
                left.append(context)
                self.windows.append([])
            left[at] -= len(piece)
            self.windows[at].append(piece)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        pieces = self.windows[number]
        empty = self.context - sum(map(len, pieces))
        tokens = torch.cat([*pieces, torch.zeros(empty, dtype=torch.long)])
        lengths = [*map(len, pieces), *([empty] if empty else [])]
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        positions = torch.cat([torch.arange(n) for n in lengths])
        labels = tokens.masked_fill(positions == 0, IGNORE)
        if empty:
            labels[-empty:] = IGNORE
        seen = (document[:, None] == document) & torch.ones(self.context, self.context).tril().bool()
        mask = torch.zeros(1, self.context, self.context, dtype=self.dtype)
        mask.masked_fill_(~seen, torch.finfo(self.dtype).min)
        return {"input_ids": tokens, "position_ids": positions, "attention_mask": mask, "labels": labels}

"""New tokens for an old model: rows that begin as the mean of the pieces that spelled them before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from transfuse.core.errors import InputError


@torch.no_grad()
def extend_vocabulary(model: nn.Module, pieces: Sequence[Sequence[int]]) -> None:
    """Add tokens to a language model, in place: to its input embedding and its output head, tied or not.

        row(new token) = mean of the rows of its pieces

    They are the first `nn.Embedding` and `nn.Linear` of the model whose weights have one shape, `(tokens, width)`.

    Args:
        model: a language model.
        pieces: for each new token, the old ids that spelled it; the new ids follow the old ones.

    Raises:
        InputError: the model has no embedding and head of one shape, a token has no pieces, or one is no old id.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    pairs = [(e, h) for e in embeddings for h in heads if e.weight.shape == h.weight.shape]
    if not pairs:
        raise InputError("no embedding and output layer of one shape in this model: it is no language model we know")
    embedding, head = pairs[0]
    size = embedding.num_embeddings
    for token, parts in enumerate(pieces):
        if not parts or not all(0 <= part < size for part in parts):
            raise InputError(f"new token {token} has the pieces {list(parts)}: expected ids from 0 to {size - 1}")
    tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(_grown(embedding.weight, pieces))
    head.weight = embedding.weight if tied else nn.Parameter(_grown(head.weight, pieces))
    if head.bias is not None:
        head.bias = nn.Parameter(_grown(head.bias, pieces))
    embedding.num_embeddings = head.out_features = size + len(pieces)
    config = getattr(model, "config", None)
    if hasattr(config, "vocab_size"):
        config.vocab_size = size + len(pieces)  # type: ignore[union-attr]


def _grown(rows: torch.Tensor, pieces: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.cat([rows, *(rows[list(parts)].mean(0, keepdim=True) for parts in pieces)])

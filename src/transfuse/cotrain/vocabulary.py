"""New tokens for an old model: rows that begin as the mean of the pieces that spelled them before, or as other rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError


def embedding_and_head(model: nn.Module) -> tuple[nn.Embedding, nn.Linear]:
    """The input embedding and the output layer of a language model: the first and the last with weights of one shape.

    Raises:
        InputError: there are none.
    """
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    pairs = [(e, h) for e in embeddings for h in heads if e.weight.shape == h.weight.shape]
    if not pairs:
        raise InputError("no embedding and output layer of one shape in this model: it is no language model we know")
    return pairs[0][0], [head for embedding, head in pairs if embedding is pairs[0][0]][-1]


@torch.no_grad()
def change_rows(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Change the rows of a language model's embedding and output layer, tied or not, in place.

    Args:
        change: from the old table, `(tokens, ...)`, to the new one; a bias is a table as well.

    Raises:
        InputError: the model has no embedding and head of one shape.
    """
    embedding, head = embedding_and_head(model)
    tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(change(embedding.weight))
    head.weight = embedding.weight if tied else nn.Parameter(change(head.weight))
    if head.bias is not None:
        head.bias = nn.Parameter(change(head.bias))
    embedding.num_embeddings = head.out_features = len(embedding.weight)
    config = getattr(model, "config", None)
    if hasattr(config, "vocab_size"):
        config.vocab_size = len(embedding.weight)  # type: ignore[union-attr]


def extend_vocabulary(model: nn.Module, pieces: Sequence[Sequence[int]]) -> None:
    """Add tokens to a language model, in place: to its input embedding and its output head, tied or not.

        row(new token) = mean of the rows of its pieces

    They are the first `nn.Embedding` and the last `nn.Linear` whose weights have one shape, `(tokens, width)`.

    Args:
        model: a language model.
        pieces: for each new token, the old ids that spelled it; the new ids follow the old ones.

    Raises:
        InputError: the model has no embedding and head of one shape, a token has no pieces, or one is no old id.
    """
    size = embedding_and_head(model)[0].num_embeddings
    for token, parts in enumerate(pieces):
        if not parts or not all(0 <= part < size for part in parts):
            raise InputError(f"new token {token} has the pieces {list(parts)}: expected ids from 0 to {size - 1}")
    change_rows(model, lambda rows: torch.cat([rows, *(rows[list(parts)].mean(0, keepdim=True) for parts in pieces)]))

"""Checkpoints whose tokens have other ids, seen with the ids of one vocabulary: rows follow the bytes of their tokens.

A row that a checkpoint has not is filled with the base's, or with the mean of those that have it. So a token that one
model alone knows keeps its row, a merge of task vectors changes no row that a model has not learned, and no row is
ever empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from transfuse.core.errors import InputError, VocabularyError
from transfuse.core.vocabulary import token_bytes
from transfuse.weights.checkpoint import Checkpoint, Spec, View
from transfuse.weights.folder import EMBEDDINGS, HEADS
from transfuse.weights.tokenizer_files import tokenizer_of

Which = Literal["base", "union", "intersection"]
"""The tokens of the reference; those and what others have beside them; or those that all have."""
Token = bytes | None


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a merge.

    Attributes:
        tokens: by id; None for a row of padding.
        added: ids from which on they are not the reference's own.
        kept: the reference's ids of the tokens, where some of its tokens are gone; None where all are there.
    """

    tokens: Sequence[Token]
    added: int
    kept: Sequence[int] | None = None


class Aligned(View):
    """A checkpoint with its rows in the order of other tokens.

    Args:
        inner: the checkpoint.
        keys: the tensors that have a row per token.
        rows: for each new row, the checkpoint's own, or -1.
        donors: checkpoints with their rows, of which those that have a row fill it where this one has none; the first
            alone where it has it.
    """

    def __init__(
        self,
        inner: Checkpoint,
        keys: Sequence[str],
        rows: Tensor,
        donors: Sequence[tuple[Checkpoint, Sequence[str], Tensor]],
    ):
        super().__init__(inner)
        self.keys, self.rows, self.donors = set(keys), rows, donors
        self.tensors = {
            key: Spec((len(rows), *spec.shape[1:]), spec.dtype) if key in self.keys else spec
            for key, spec in inner.tensors.items()
        }
        if inner.config is not None and "vocab_size" in inner.config:
            self.config = {**inner.config, "vocab_size": len(rows)}

    def read(self, key: str) -> Tensor:
        tensor = self.inner.read(key)
        if key not in self.keys:
            return tensor
        moved = tensor[self.rows.clamp(min=0)]
        lacking = (self.rows < 0).nonzero()[:, 0]
        if not len(lacking):
            return moved
        total = torch.zeros(len(lacking), *tensor.shape[1:])
        count = torch.zeros(len(lacking), *[1] * (tensor.dim() - 1))
        for number, (donor, _, rows) in enumerate(self.donors):
            has = rows[lacking] >= 0
            if number:  # what the first has, the others need not give
                has &= self.donors[0][2][lacking] < 0
            if bool(has.any()):
                total[has] += donor.read(donor.tied.get(key, key))[rows[lacking[has]]].float()
                count[has] += 1
        moved[lacking] = (total / count).to(moved.dtype)
        return moved


def align(
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    which: Which = "base",
    tokenizers: Sequence[Any] | None = None,
) -> tuple[Checkpoint | None, list[Checkpoint], Vocabulary]:
    """All checkpoints with the ids of one vocabulary.

    Args:
        tokenizers: of the base (where there is one) and of every model, as
            :func:`transfuse.core.vocabulary.token_bytes` takes them; by default those in their folders.

    Raises:
        InputError: a checkpoint has no tokenizer, or nothing in it has a row per token.
        VocabularyError: a tokenizer has more tokens than its checkpoint has rows, or they have none in common.
    """
    if which not in ("base", "union", "intersection"):
        raise InputError(f"vocabulary is {which!r}, it must be 'base', 'union' or 'intersection'")
    parents = [*(() if base is None else (base,)), *models]
    given = [tokenizer_of(parent) for parent in parents] if tokenizers is None else list(tokenizers)
    if len(given) != len(parents):
        raise InputError(f"there are {len(given)} tokenizers for {len(parents)} checkpoints")
    known = [_Rows.of(parent, token_bytes(tokenizer)) for parent, tokenizer in zip(parents, given, strict=True)]
    vocabulary = _vocabulary(known, which)
    rows = [one.rows(vocabulary, reference=i == 0, first=known[0]) for i, one in enumerate(known)]
    tables = [(one.checkpoint, one.keys, row) for one, row in zip(known, rows, strict=True)]
    # The reference gives first; without a base there is none that comes first, and all give alike.
    nobody = (known[0].checkpoint, known[0].keys, torch.full_like(rows[0], -1))
    donors = tables if base is not None else [nobody, *tables]
    aligned: list[Checkpoint] = [
        Aligned(one.checkpoint, one.keys, row, donors) for one, row in zip(known, rows, strict=True)
    ]
    return (None, aligned, vocabulary) if base is None else (aligned[0], aligned[1:], vocabulary)


@dataclass(frozen=True)
class _Rows:
    """A checkpoint's tensors that have a row per token, and which row a token has."""

    checkpoint: Checkpoint
    keys: list[str]
    size: int
    tokens: Sequence[Token]

    @classmethod
    def of(cls, checkpoint: Checkpoint, tokens: Sequence[Token]) -> _Rows:
        named = [k for k in checkpoint.tensors if any(part in k.lower() for part in (*EMBEDDINGS, *HEADS))]
        declared = (checkpoint.config or {}).get("vocab_size")
        sizes = {checkpoint.tensors[k].shape[0] for k in named if len(checkpoint.tensors[k].shape) == 2}
        if declared is None and len(fitting := {size for size in sizes if size >= len(tokens)}) == 1:
            declared = fitting.pop()
        keys = [k for k in named if checkpoint.tensors[k].shape[:1] == (declared,)]
        if not keys:
            raise InputError(
                f"no embedding or output layer of {checkpoint.name} has a row per token: its tokenizer knows "
                f"{len(tokens)}, its tables have {sorted(sizes)} rows"
            )
        if len(tokens) > int(declared or 0):
            raise VocabularyError(
                f"the tokenizer of {checkpoint.name} has {len(tokens)} ids, its tables {declared} rows"
            )
        return cls(checkpoint, keys, int(declared or 0), tokens)

    def rows(self, vocabulary: Vocabulary, reference: bool, first: _Rows) -> Tensor:
        ids = {token: i for i, token in reversed(list(enumerate(self.tokens))) if token is not None}
        found = [-1 if token is None else ids.get(token, -1) for token in vocabulary.tokens]
        if reference:  # its rows of padding are its own, and everyone's
            found = [
                i if token is None and i < self.size else row
                for i, (row, token) in enumerate(zip(found, vocabulary.tokens, strict=True))
            ]
        return torch.tensor(found)


def _vocabulary(known: Sequence[_Rows], which: Which) -> Vocabulary:
    reference = known[0]
    own = [*reference.tokens, *[None] * (reference.size - len(reference.tokens))]
    if which == "base":
        return Vocabulary(own, len(own))
    others = [{token for token in one.tokens if token is not None} for one in known[1:]]
    if which == "intersection":
        kept = [i for i, t in enumerate(reference.tokens) if t is not None and all(t in other for other in others)]
        if not kept:
            raise VocabularyError("these tokenizers have no token in common")
        shared = [reference.tokens[i] for i in kept]
        return Vocabulary(shared, len(kept), kept if len(kept) < reference.size else None)
    tokens, seen = list(own), set(own)
    for one in known[1:]:
        new = [token for token in one.tokens if token is not None and token not in seen]
        tokens += new
        seen |= set(new)
    return Vocabulary(tokens, len(own))

"""Which token of one vocabulary takes the place of each token of another, and how good that is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from transfuse.core.errors import InputError, StoreError
from transfuse.core.files import write_atomically
from transfuse.core.vocabulary import token_bytes
from transfuse.weights.glove import Vectors

KINDS = ("same surface", "same role", "aligned", "at random", "no token")
SURFACE, ROLE, ALIGNED, RANDOM, NONE = range(5)
ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
"""Special tokens, by the names of Hugging Face's attributes `bos_token_id`, ..."""
SIMILARITIES = ("relative", "cosine", "vanilla")
SURFACES = ("bytes", "strings")
CHUNK = 1024
"""Tokens that are compared with all others at once."""


@dataclass(frozen=True)
class TokenMapping:
    """A function from target ids to source ids; several may go to one.

    Attributes:
        source: `(target size,)` source ids.
        kinds: `(target size,)` why, positions in :data:`KINDS`.
        source_size: of the source's vocabulary.
    """

    source: Tensor
    kinds: Tensor
    source_size: int

    def __call__(self, ids: Tensor) -> Tensor:
        """Target ids as source ids, in any shape."""
        return self.source.to(ids.device)[ids]

    @property
    def counts(self) -> dict[str, int]:
        """How many target tokens there are of each kind."""
        return {kind: int((self.kinds == i).sum()) for i, kind in enumerate(KINDS)}

    def invert(self) -> dict[int, list[int]]:
        """The target ids that go to each source id, where there are any."""
        found: dict[int, list[int]] = {}
        for target, source in enumerate(self.source.tolist()):
            found.setdefault(source, []).append(target)
        return found

    def report(self) -> str:
        """In words: how tokens were mapped, and how many source tokens serve."""
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if count)
        used = len(self.invert())
        return f"{len(self.source)} target tokens ({counts}) go to {used} of {self.source_size} source tokens"

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        content = {"source": self.source.tolist(), "kinds": self.kinds.tolist(), "source_size": self.source_size}
        write_atomically(path, json.dumps({"format": 1, **content}))

    @classmethod
    def load(cls, path: str | Path) -> TokenMapping:
        """Read what :meth:`save` wrote.

        Raises:
            StoreError: the file cannot be read, or holds no mapping.
        """
        try:
            found = json.loads(Path(path).read_bytes())
            source, kinds = torch.tensor(found["source"]), torch.tensor(found["kinds"])
            size = int(found["source_size"])
            if (
                source.shape != kinds.shape
                or source.dim() != 1
                or not 0 <= int(source.min()) <= int(source.max()) < size
            ):
                raise ValueError("its ids do not fit its size")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise StoreError(f"{path} holds no mapping of tokens: {error}") from error
        return cls(source, kinds, size)


def surfaces(tokenizer: Any, match: str = "bytes") -> Sequence[Any]:
    """What each token looks like, by id: its bytes, or the string that the tokenizer's own dictionary has."""
    if match == "bytes" or not hasattr(tokenizer, "get_vocab"):
        return token_bytes(tokenizer)
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    found: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, i in vocabulary.items():
        found[i] = token
    return found


def roles(tokenizer: Any) -> dict[str, int]:
    """The ids of special tokens by role, where a tokenizer tells."""
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}
    return {role: i for role, i in ids.items() if isinstance(i, int)}


def relative(vectors: Tensor, pivots: Tensor) -> Tensor:
    """Cosines with the pivots, `(tokens, pivots)`: the same however the space is turned."""
    unit = F.normalize(vectors, dim=1)
    return unit @ unit[pivots].T


def nearest(ours: Tensor, theirs: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """The `count` rows of `theirs` with the largest product with each row of `ours`: products and rows."""
    parts = [(part @ theirs.T).topk(count) for part in ours.split(CHUNK)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


@dataclass(frozen=True)
class Spaces:
    """Both vocabularies in one space.

    Attributes:
        target, source: `(size, dimension)`; rows of unknown tokens mean nothing.
        target_known, source_known: which are known.
    """

    target: Tensor
    source: Tensor
    target_known: Tensor
    source_known: Tensor


def comparable(
    target: Vectors,
    source: Vectors,
    gold: Mapping[int, int],
    pivots: int,
    similarity: str = "relative",
    seed: int = 0,
) -> Spaces:
    """Two spaces of vectors made comparable by pairs of tokens that mean the same.

    Args:
        gold: target id -> source id.
        pivots: how many of these pairs, drawn at random, serve.
        similarity: what products of the result are: `"relative"`, of cosines with the pivots; `"cosine"`, the same
            divided by their norms; `"vanilla"`, of the vectors as they are.

    Raises:
        InputError: fewer pairs than pivots are known on both sides.
    """
    if similarity == "vanilla":
        return Spaces(target.vectors, source.vectors, target.known, source.known)
    pairs = torch.tensor([(t, s) for t, s in gold.items() if target.known[t] and source.known[s]]).view(-1, 2)
    if len(pairs) < pivots:
        raise InputError(
            f"{len(pairs)} tokens are the same in both vocabularies and frequent enough, {pivots} pivots are asked "
            f"for: set pivots={len(pairs)} or fewer, or give more text"
        )
    chosen = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:pivots]]
    ours, theirs = relative(target.vectors, chosen[:, 0]), relative(source.vectors, chosen[:, 1])
    if similarity == "cosine":
        ours, theirs = F.normalize(ours, dim=1), F.normalize(theirs, dim=1)
    return Spaces(ours, theirs, target.known, source.known)


def gold_pairs(target: Sequence[Any], source: Sequence[Any]) -> dict[int, int]:
    """Target id -> source id of tokens that look the same."""
    ids: dict[Any, int] = {}
    for i, token in enumerate(source):
        if token is not None:
            ids.setdefault(token, i)
    return {i: ids[token] for i, token in enumerate(target) if token is not None and token in ids}


def mapped(
    target: Sequence[Any],
    source: Sequence[Any],
    spaces: Spaces,
    gold: Mapping[int, int],
    roles: Mapping[int, int],
    excluded: Sequence[int],
    seed: int = 0,
) -> TokenMapping:
    """A source token for every target token: by role, by surface, by similarity, or at random where it is too rare.

    Args:
        target, source: surfaces by id; None where an id means nothing.
        gold, roles: target id -> source id.
        excluded: source ids that are not taken for similarity: special tokens.
    """
    draws, sizes = torch.Generator().manual_seed(seed), (len(spaces.target_known), len(spaces.source_known))
    found = torch.randint(max(1, len(source)), (sizes[0],), generator=draws)
    kinds = torch.full((sizes[0],), RANDOM, dtype=torch.uint8)
    candidates = spaces.source_known.clone()
    candidates[list(excluded)] = False
    if bool(candidates.any()):
        ids = candidates.nonzero().flatten()
        best = nearest(spaces.target[spaces.target_known], spaces.source[ids])[1][:, 0]
        found[spaces.target_known], kinds[spaces.target_known] = ids[best], ALIGNED
    unused = torch.tensor([i >= len(target) or target[i] is None for i in range(sizes[0])])
    kinds[unused] = NONE
    for pairs, kind in ((gold, SURFACE), (roles, ROLE)):
        for i, j in pairs.items():
            found[i], kinds[i] = j, kind
    return TokenMapping(found, kinds, sizes[1])


def bleu1(hypotheses: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> float:
    """Corpus BLEU of single tokens, in [0, 1]: clipped precision times the penalty for what is too short.

    Raises:
        InputError: their numbers differ, or there is no token.
    """
    if len(hypotheses) != len(references):
        raise InputError(f"found {len(hypotheses)} texts and {len(references)} references: give one for each")
    pairs = list(zip(hypotheses, references, strict=True))
    matched = sum(sum((Counter(h) & Counter(r)).values()) for h, r in pairs)
    ours, theirs = sum(len(h) for h, _ in pairs), sum(len(r) for _, r in pairs)
    if not ours or not theirs:
        raise InputError("there is no token to compare")
    return matched / ours * (1.0 if ours >= theirs else exp(1 - theirs / ours))


def alignment_quality(mapping: TokenMapping, target: Tensor, source: Tensor) -> float:
    """BLEU-1 of target tokens, mapped, against what the source's tokenizer makes of the same texts.

    Args:
        target, source: `(texts, tokens)` ids; negative ones are padding.
    """
    ours, theirs = ([row[row >= 0].tolist() for row in side] for side in (target, source))
    return bleu1([mapping.source[torch.tensor(row, dtype=torch.long)].tolist() for row in ours], theirs)

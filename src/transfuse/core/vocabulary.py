"""Whether two language models mean the same tokens, by the bytes of their tokens and never by position alone.

A model says what its ids mean by an attribute `tokenizer`: one of Hugging Face's or of `tokenizers`, a mapping from
tokens to ids, or a list of bytes by id (:data:`BYTES` for a model that reads bytes).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, zip_longest
from typing import Any, Literal

from transfuse.core.errors import InputError, VocabularyError
from transfuse.core.outputs import Outputs
from transfuse.losses.scores import Projection, Sampled, TopK

BYTES = tuple(bytes([i]) for i in range(256))
"""The vocabulary of a model that reads bytes."""

OTHERS = (
    "ByteSpanKD (aligned spans of bytes), SortedLogitsKD (sorted probabilities), or Labels on texts that the teacher "
    "wrote (what SeqKD does where tokens are the same)"
)
"""What works where tokens differ."""
UNKNOWN = (
    "what their ids mean is not known. If only an output layer is padded, set `model.tokenizer` on both models: the "
    f"bytes of their tokens are compared, and both are cut to the ids they share. For different tokens use {OTHERS}"
)


@dataclass(frozen=True)
class Relation:
    """How two vocabularies stand to each other.

    Attributes:
        kind: `"identical"`; `"padded"`, the same ids with a head that is longer on one side or both; `"different"`.
        common: how many ids mean the same on both sides, from 0 on.
        differing: up to five ids with the bytes of both sides, where they differ.
    """

    kind: Literal["identical", "padded", "different"]
    common: int
    differing: tuple[tuple[int, bytes | None, bytes | None], ...] = ()


def compare(student: Any, teacher: Any, student_classes: int, teacher_classes: int) -> Relation:
    """Compare two tokenizers, and the output layers that go with them.

    Ids that neither tokenizer knows are padding of the output layer.

    Raises:
        InputError: one of them is nothing that tokens can be read from.
        VocabularyError: a tokenizer knows more ids than its model has outputs.
    """
    ours, theirs = token_bytes(student), token_bytes(teacher)
    for side, tokens, classes in (("target", ours, student_classes), ("source", theirs, teacher_classes)):
        if len(tokens) > classes:
            raise VocabularyError(
                f"the tokenizer of the {side} has ids up to {len(tokens) - 1}, its model {classes} outputs: resize the "
                "model's embeddings, or give it its own tokenizer"
            )
    if ours != theirs:  # asked for every token that is generated, and lists compare fast
        pairs = enumerate(zip_longest(ours, theirs))
        differing = tuple(islice(((i, a, b) for i, (a, b) in pairs if a != b), 5))
        if differing:
            return Relation("different", differing[0][0], differing)
    kind: Literal["identical", "padded"] = "identical" if student_classes == teacher_classes else "padded"
    return Relation(kind, min(student_classes, teacher_classes))


def common_classes(student: Any, teacher: Any, student_classes: int, teacher_classes: int) -> int:
    """How many classes two language models share, from 0 on, so that their logits can be compared.

    Where a model does not say what its ids mean, equal numbers are taken to be the same tokens.

    Args:
        student, teacher: the models, or stores; their `tokenizer` is read where they have one.

    Raises:
        VocabularyError: they mean different tokens, or their numbers differ and it cannot be known why.
    """
    ours, theirs = getattr(student, "tokenizer", None), getattr(teacher, "tokenizer", None)
    if ours is None or theirs is None:
        if student_classes == teacher_classes:
            return student_classes
        raise VocabularyError(
            f"the target has {student_classes} classes, the source has {teacher_classes}, and {UNKNOWN}"
        )
    relation = compare(ours, theirs, student_classes, teacher_classes)
    if relation.kind == "different":
        shown = "; ".join(f"{i}: {a!r} in the target, {b!r} in the source" for i, a, b in relation.differing)
        raise VocabularyError(
            f"target and source mean different tokens by the same ids ({shown}), so their logits cannot be compared, "
            f"nor can one read what the other reads. Methods that work: {OTHERS}"
        )
    return relation.common


def cut(outputs: Outputs, classes: int) -> Outputs:
    """The same with the first classes alone; of logits that have not been computed, the rest never will be."""
    raw = outputs.raw
    if isinstance(raw, TopK | Sampled):  # what lies beyond cannot be taken out of what was kept
        return outputs
    if isinstance(raw, Projection):
        if raw.shape[-1] == classes:
            return outputs
        bias = None if raw.bias is None else raw.bias[:classes]
        return Outputs(replace(raw, weight=raw.weight[:classes], bias=bias), outputs.features)
    logits = outputs.logits
    return outputs if logits.shape[-1] == classes else Outputs(logits[..., :classes], outputs.features)


def token_bytes(tokenizer: Any) -> Sequence[bytes | None]:
    """The bytes of every token by id; None for an id that means nothing.

    Raises:
        InputError: nothing that tokens can be read from.
    """
    if isinstance(tokenizer, list | tuple):
        return [t.encode() if isinstance(t, str) else t for t in tokenizer]
    if isinstance(tokenizer, Mapping):
        return _by_id({t.encode() if isinstance(t, str) else t: i for t, i in tokenizer.items()})
    if not hasattr(tokenizer, "get_vocab"):
        raise InputError(
            f"tokens cannot be read from a {type(tokenizer).__name__}: expected a tokenizer with get_vocab(), a "
            "mapping from tokens to ids, or a list of bytes by id"
        )
    return _read(tokenizer)


@lru_cache(maxsize=8)
def _read(tokenizer: Any) -> Sequence[bytes | None]:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    described = backend.to_str() if hasattr(backend, "to_str") else ""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    special = {str(t) for t in getattr(tokenizer, "all_special_tokens", ())}
    table = _byte_level()
    if '"ByteLevel"' in described or table.keys() <= vocabulary.keys():
        read = {t: bytes(table[c] for c in t) if all(c in table for c in t) else t.encode() for t in vocabulary}
    else:
        pieces = any(t.startswith("▁") for t in vocabulary)  # of SentencePiece, which marks a space so
        read = {t: _piece(t) if pieces else t.encode() for t in vocabulary}
    return _by_id({(read[t] if t not in special else t.encode(), t): i for t, i in vocabulary.items()})


def _piece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _by_id(tokens: Mapping[Any, int]) -> list[bytes | None]:
    found: list[bytes | None] = [None] * (max(tokens.values(), default=-1) + 1)
    for token, i in tokens.items():
        found[i] = token[0] if isinstance(token, tuple) else token
    return found


def _byte_level() -> dict[str, int]:
    """The printable character that byte-level tokenizers write for each byte (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}

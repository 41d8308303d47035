"""Stores of the log-probabilities that services and servers wrote down, without a teacher at hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from transfuse.core.batch import Batch, padding_mask, token_ids
from transfuse.core.errors import InputError, StoreError
from transfuse.core.store.forms import TopKept
from transfuse.core.store.shards import Record, what_is_asked, write_shard
from transfuse.core.store.store import SHARD, TeacherStore, claim, tokenizer_fingerprint
from transfuse.core.streams import Indexed, by_number
from transfuse.core.vocabulary import token_bytes
from transfuse.losses.reduction import IGNORE

Position = tuple[int, dict[int, float]]
"""A position in a sample's tokens, and the log-probabilities of what comes after it, by id."""


def import_openai(
    folder: str | Path, responses: str | Path | Iterable[Mapping[str, Any]], data: Any, tokenizer: Any, classes: int
) -> TeacherStore:
    """A top-k store of what an OpenAI-style service returned with `logprobs` and `top_logprobs`.

    Args:
        responses: one per sample, in order: a JSON-lines file, or mappings. Each is a whole response, a choice, or its
            `logprobs`; what is read is `content[*]`, with `token` or `bytes`, and `top_logprobs`.
        data: the samples, in the same order, as token ids; the response's tokens are those that have labels, or else
            the last ones.
        tokenizer: of the data, see :mod:`transfuse.core.vocabulary`.
        classes: outputs of the student.

    Raises:
        StoreError: a response has other tokens than its sample, or there are not as many as samples.
        InputError: a response has no log-probabilities.
    """
    ids = {token: i for i, token in reversed(list(enumerate(token_bytes(tokenizer)))) if token is not None}

    def positions(number: int, response: Mapping[str, Any], tokens: list[int], answer: Sequence[int]) -> list[Position]:
        content = _content(number, response)
        spoken = [ids.get(_bytes(entry)) for entry in content]
        at = list(answer)[-len(content) :] if content else []
        if len(at) < len(content) or spoken != [tokens[i] for i in at]:
            raise StoreError(
                f"response {number} has {len(content)} tokens that are not those of sample {number} at its end: "
                "tokenise the service's own text with its tokenizer, or use SeqKD, which needs text alone"
            )
        found = []
        for i, entry in zip(at, content, strict=True):
            known = {ids[b]: e["logprob"] for e in entry.get("top_logprobs") or [] if (b := _bytes(e)) in ids}
            found.append((i - 1, known | {tokens[i]: entry["logprob"]}))  # what was chosen may not be among the top
        return found

    return _import(folder, responses, data, tokenizer, classes, positions)


def import_vllm(
    folder: str | Path, outputs: str | Path | Iterable[Mapping[str, Any]], data: Any, tokenizer: Any, classes: int
) -> TeacherStore:
    """A top-k store of what vLLM returned for `prompt_logprobs`.

    Args:
        outputs: one per sample, in order: a JSON-lines file, or mappings with `prompt_logprobs`: null for the first
            token, then for each token a mapping from ids to `{"logprob": ...}` or to a number.
        data: the samples, in the same order, as the token ids that vLLM was given.
        tokenizer: of the data, or None; its fingerprint is kept.
        classes: outputs of the student.

    Raises:
        StoreError: as :func:`import_openai`.
        InputError: an output has no `prompt_logprobs`.
    """

    def positions(number: int, output: Mapping[str, Any], tokens: list[int], answer: Sequence[int]) -> list[Position]:
        if not isinstance(given := output.get("prompt_logprobs"), Sequence):
            raise InputError(
                f"output {number} has no 'prompt_logprobs': ask vLLM with SamplingParams(prompt_logprobs=k)"
            )
        if len(given) != len(tokens) or list(output.get("prompt_token_ids", tokens)) != tokens:
            raise StoreError(f"output {number} is about {len(given)} tokens, and not those of sample {number}")
        found = []
        for i, entry in enumerate(given):
            if entry is None:
                continue
            known = {int(k): float(v["logprob"] if isinstance(v, Mapping) else v) for k, v in entry.items()}
            if tokens[i] not in known:  # vLLM always adds the token that was there
                raise StoreError(f"output {number} says nothing about token {i} of sample {number}: it is other text")
            found.append((i - 1, known))
        return found

    return _import(folder, outputs, data, tokenizer, classes, positions)


def _import(
    folder: str | Path,
    given: str | Path | Iterable[Mapping[str, Any]],
    data: Any,
    tokenizer: Any,
    classes: int,
    positions: Callable[[int, Mapping[str, Any], list[int], Sequence[int]], list[Position]],
) -> TeacherStore:
    stream, path = by_number(data), Path(folder)
    answers = [
        (sample, positions(number, answer, tokens, answer_at), tokens, asked)
        for number, (answer, (sample, tokens, answer_at, asked)) in enumerate(_paired(_lines(given), stream))
    ]
    k = max((len(known) for _, found, _, _ in answers for _, known in found), default=1)
    form = TopKept(k, "float32")
    known_by = tokenizer_fingerprint(tokenizer) if hasattr(tokenizer, "get_vocab") else None
    claim(path, stream, form, classes=classes, teacher="imported", tokenizer=known_by)
    for number in range(math.ceil(stream.size / SHARD)):
        part = answers[number * SHARD : (number + 1) * SHARD]
        write_shard(path, number, (_record(form, classes, *answer) for answer in part))
    return TeacherStore(path)


def _record(form: TopKept, classes: int, sample: int, found: list[Position], tokens: list[int], asked: int) -> Record:
    ids = torch.zeros(len(tokens), form.k, dtype=torch.int32)
    values = torch.full((len(tokens), form.k), -math.inf)
    for at, known in found:
        if at < 0:
            continue  # of the first token nothing came before
        if wrong := [i for i in known if not 0 <= i < classes]:
            raise StoreError(f"sample {sample}: id {wrong[0]} is none of the student's {classes} classes")
        ids[at, : len(known)] = torch.tensor(list(known), dtype=torch.int32)
        values[at, : len(known)] = torch.tensor(list(known.values()))
    return Record(sample, asked, len(tokens), form.pack({"ids": ids, "log_probabilities": values}))


def _paired(
    given: Iterator[Mapping[str, Any]], data: Indexed
) -> Iterator[tuple[Mapping[str, Any], tuple[int, list[int], list[int], int]]]:
    """Each answer with its sample: id, real tokens, where its labels are, hash."""
    for number in range(data.size):
        batch = data.fetch(torch.tensor([number]))
        if (answer := next(given, None)) is None:
            raise StoreError(f"there are {number} answers for {data.size} samples: one for each is needed, in order")
        yield answer, (int(batch.index[0]), *_read(batch), what_is_asked(batch)[0])
    if next(given, None) is not None:
        raise StoreError(f"there are more answers than the {data.size} samples")


def _read(batch: Batch) -> tuple[list[int], list[int]]:
    tokens, real = token_ids(batch)[0], padding_mask(batch)
    labels = batch.labels[0] if batch.labels is not None else None
    if real is not None:
        tokens, labels = tokens[real[0]], None if labels is None else labels[real[0]]
    at = range(len(tokens)) if labels is None else (labels != IGNORE).nonzero()[:, 0].tolist()
    return tokens.tolist(), list(at)


def _content(number: int, response: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner: Any = response
    if isinstance(inner, Mapping) and "choices" in inner:
        inner = inner["choices"][0]
    if isinstance(inner, Mapping) and "logprobs" in inner:
        inner = inner["logprobs"]
    if not isinstance(inner, Mapping) or not isinstance(inner.get("content"), list):
        raise InputError(f"response {number} has no log-probabilities: ask with logprobs=True and top_logprobs=20")
    return inner["content"]


def _bytes(entry: Mapping[str, Any]) -> bytes:
    return bytes(entry["bytes"]) if entry.get("bytes") is not None else str(entry["token"]).encode()


def _lines(given: str | Path | Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    if not isinstance(given, str | Path):
        yield from given
        return
    try:
        with Path(given).open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise StoreError(f"line {number + 1} of {given} is no JSON: {error}") from None
    except OSError as error:
        raise StoreError(f"cannot read {given}: {error}") from None

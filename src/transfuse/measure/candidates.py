"""How probable a language model finds each candidate for a gap in a sentence: masked, causal and encoder-decoder.

What is made of the scores is in the measures, :mod:`transfuse.measure.rankc` for one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError, StoreError, nearest
from transfuse.core.outputs import call, find_logits, modes_kept
from transfuse.measure.base import device_of

SLOT, SENTINEL = "<mask>", "<extra_id_0>"
KINDS = ("masked", "causal", "seq2seq")
SPANS = ("sentence", "candidate")


@dataclass(frozen=True)
class Cloze:
    """A sentence with a gap, and what may stand there.

    Attributes:
        prompt: with :data:`SLOT` where the gap is.
        candidates: what may stand in it; in another language they are translated position by position.
        golds: positions of the right ones.

    Raises:
        InputError: no gap or several, a candidate given twice (positions would be ambiguous), or no gold among them.
    """

    prompt: str
    candidates: tuple[str, ...]
    golds: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.prompt.count(SLOT) != 1:
            raise InputError(f"a prompt has the gap {SLOT} once, found {self.prompt!r}")
        if doubled := sorted({c for c in self.candidates if self.candidates.count(c) > 1}):
            raise InputError(
                f"the candidate {doubled[0]!r} of {self.prompt!r} is there twice: two translations fell together, and "
                "positions no longer tell them apart"
            )
        if not self.golds or not all(0 <= gold < len(self.candidates) for gold in self.golds):
            raise InputError(f"{self.prompt!r} needs its right answers among its {len(self.candidates)} candidates")


def read_facts(files: Mapping[str, str | Path]) -> tuple[dict[str, list[Cloze]], int]:
    """Read the same facts in several languages, one file each as BMLAMA has them.

    A line is a prompt, its answers and its candidates, split by tabs, the latter two by `", "`. A fact that
    :class:`Cloze` refuses in one language is left out in all.

    Args:
        files: language -> its file.

    Returns:
        The facts by language, and how many were left out.

    Raises:
        StoreError: a file cannot be read.
        InputError: a line has another form, or the files have different numbers of lines.
    """
    lines = {language: _lines(Path(file)) for language, file in files.items()}
    if len({len(found) for found in lines.values()}) > 1:
        raise InputError(f"the files must have the same facts, found { ({k: len(v) for k, v in lines.items()}) } lines")
    facts: dict[str, list[Cloze]] = {language: [] for language in files}
    dropped = 0
    for row in zip(*lines.values(), strict=True):
        try:
            clozes = [_cloze(*fields) for fields in row]
        except InputError:
            dropped += 1
            continue
        for language, cloze in zip(facts, clozes, strict=True):
            facts[language].append(cloze)
    return facts, dropped


def _lines(file: Path) -> list[list[str]]:
    try:
        lines = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{file} cannot be read: {error}") from error
    lines = [line for line in lines if line[0] != "Prompt"]
    for line in lines:
        if len(line) != 3:
            raise InputError(f"{file}: a line is a prompt, answers and candidates split by tabs, found {line[:4]}")
    return lines


def _cloze(prompt: str, golds: str, candidates: str) -> Cloze:
    names = tuple(candidates.split(", "))
    if absent := [gold for gold in golds.split(", ") if gold not in names]:
        raise InputError(f"the answer {absent[0]!r} of {prompt!r} is none of its candidates")
    return Cloze(prompt, names, tuple(names.index(gold) for gold in golds.split(", ")))


class _Item(NamedTuple):
    """One row of a batch: tokens, and which of its positions give the log-probability of which tokens."""

    inputs: list[int]
    decoder: list[int]
    places: list[int]
    tokens: list[int]


class CandidateScorer:
    """Mean negative log-likelihood of each candidate: lower is more probable.

    - masked: the gap becomes as many masks as the candidate has tokens; they are filled from left to right, and each
      token is scored before it is filled in
    - causal: the candidate stands in the sentence; the mean is over the whole sentence (or over the candidate)
    - seq2seq: the gap becomes a sentinel; the candidate is scored after the sentinel in the decoder

    The mean, not the sum: otherwise a candidate of many tokens could not win.

    Args:
        model: a language model, called with `input_ids` and `attention_mask`.
        tokenizer: of Hugging Face, or anything called in the same way that has the special tokens that are needed.
        kind: one of :data:`KINDS`.
        span: `"sentence"` (as published) or `"candidate"`, for causal models. The first includes the template, which
            changes ranks where candidates differ in length.
        batch_size: sequences per forward pass.

    Raises:
        InputError: an unknown kind or span, or a tokenizer without the mask or sentinel that the kind needs.

    Source: Qi, Fernández and Bisazza, EMNLP 2023, arXiv:2310.10378.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, kind: str = "masked", span: str = "sentence", batch_size: int = 64
    ):
        for value, known, what in ((kind, KINDS, "kind"), (span, SPANS, "span")):
            if value not in known:
                raise InputError(f"unknown {what} {value!r}: {nearest(value, known)}")
        if kind == "masked" and getattr(tokenizer, "mask_token_id", None) is None:
            raise InputError("a masked model is scored with its mask, and this tokenizer has no mask_token_id")
        self.model, self.tokenizer, self.kind, self.span, self.batch_size = model, tokenizer, kind, span, batch_size
        whole, plain = tokenizer("a")["input_ids"], self._encode("a")
        begin = next(i for i in range(len(whole)) if list(whole[i : i + len(plain)]) == plain)
        self._first, self._last = list(whole[:begin]), list(whole[begin + len(plain) :])
        if kind == "causal":
            bos = getattr(tokenizer, "bos_token_id", None)
            self._first = self._first or ([] if bos is None else [bos])  # or the first word would not be scored
            self._last = []
        if kind == "seq2seq":
            self._sentinel = int(tokenizer.convert_tokens_to_ids(SENTINEL))
            self._start = getattr(getattr(model, "config", None), "decoder_start_token_id", None)
            if self._start is None or self._sentinel == getattr(tokenizer, "unk_token_id", None):
                raise InputError(
                    f"an encoder-decoder is scored after {SENTINEL}, which its tokenizer must know, and from its "
                    "config.decoder_start_token_id, which must be set"
                )

    @torch.no_grad()
    def __call__(self, clozes: Sequence[Cloze]) -> list[Tensor]:
        """One score per candidate, `(candidates,)` float64, for each sentence."""
        sums = [torch.zeros(len(cloze.candidates), dtype=torch.float64) for cloze in clozes]
        counts = [torch.zeros_like(total) for total in sums]
        rows = self._all(clozes)
        with modes_kept(self.model):
            self.model.eval()
            while chunk := list(islice(rows, self.batch_size)):
                totals = self._nll([item for _, _, item in chunk])
                for (query, candidate, item), total in zip(chunk, totals, strict=True):
                    sums[query][candidate] += total
                    counts[query][candidate] += len(item.tokens)
        return [total / count for total, count in zip(sums, counts, strict=True)]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _all(self, clozes: Sequence[Cloze]) -> Iterator[tuple[int, int, _Item]]:
        for query, cloze in enumerate(clozes):
            left, right = cloze.prompt.split(SLOT)
            space = " " if left.endswith(" ") else ""  # belongs to the word after it, as tokenizers see it
            before, after = self._first + self._encode(left.rstrip(" ")), self._encode(right) + self._last
            for number, candidate in enumerate(cloze.candidates):
                tokens = self._encode(space + candidate)
                if not tokens:
                    raise InputError(f"the candidate {candidate!r} of {cloze.prompt!r} has no tokens")
                for item in getattr(self, f"_{self.kind}")(before, tokens, after):
                    yield query, number, item

    def _masked(self, before: list[int], tokens: list[int], after: list[int]) -> Iterable[_Item]:
        mask = [self.tokenizer.mask_token_id]
        for done, token in enumerate(tokens):
            place = len(before) + done
            yield _Item(before + tokens[:done] + mask * (len(tokens) - done) + after, [], [place], [token])

    def _causal(self, before: list[int], tokens: list[int], after: list[int]) -> Iterable[_Item]:
        whole = before + tokens + after
        begin, end = (1, len(whole)) if self.span == "sentence" else (len(before), len(before) + len(tokens))
        begin = max(begin, 1)  # nothing predicts the very first token
        yield _Item(whole, [], list(range(begin - 1, end - 1)), whole[begin:end])

    def _seq2seq(self, before: list[int], tokens: list[int], after: list[int]) -> Iterable[_Item]:
        assert self._start is not None
        decoder = [self._start, self._sentinel, *tokens[:-1]]
        yield _Item([*before, self._sentinel, *after], decoder, list(range(1, len(tokens) + 1)), tokens)

    def _nll(self, items: Sequence[_Item]) -> list[float]:
        """The summed negative log-likelihood of each row's tokens."""
        device = device_of(self.model)
        ids, mask = _padded([item.inputs for item in items])
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        if items[0].decoder:
            inputs["decoder_input_ids"] = _padded([item.decoder for item in items])[0].to(device)
        logits = find_logits(call(self.model, inputs))
        rows = torch.tensor([row for row, item in enumerate(items) for _ in item.tokens], device=device)
        places = torch.tensor([place for item in items for place in item.places], device=device)
        tokens = torch.tensor([token for item in items for token in item.tokens], device=device)
        chosen = logits[rows, places].double().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        return torch.zeros(len(items), dtype=torch.float64, device=device).index_add(0, rows, -chosen).tolist()


def vocabulary_overlap(encoded: Mapping[str, Iterable[int]]) -> Tensor:
    """Share of tokens that two languages have in common, on parallel text: `|A and B| / |A or B|`, `(L, L)`.

    Args:
        encoded: language -> token ids of its text.
    """
    sets = [set(tokens) for tokens in encoded.values()]
    return torch.tensor([[len(a & b) / max(len(a | b), 1) for b in sets] for a in sets], dtype=torch.float64)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right, and the mask of what is real; what the padding is does not matter."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask

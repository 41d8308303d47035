"""TokAlign: does a model of English tokens begin well with tokens of German, and stay ahead while it is tuned?"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proofs.runner import SMOKE_STEPS
from proofs.study import Numbers, Study
from transfuse import transfer
from transfuse.core import rng
from transfuse.core.batch import Batch
from transfuse.core.errors import StoreError
from transfuse.core.streams import as_data
from transfuse.cotrain.vocabulary import change_rows
from transfuse.datasets import paired_tokens
from transfuse.datasets.documents import MANUAL, manual
from transfuse.distill import Labels
from transfuse.evaluation import evaluate
from transfuse.models import DecoderLM
from transfuse.weights import TokAlign
from transfuse.weights.glove import cooccurrence, glove
from transfuse.weights.tokalign import mapping_rows, real_ids
from transfuse.weights.token_mapping import (
    SIMILARITIES,
    TokenMapping,
    alignment_quality,
    comparable,
    gold_pairs,
    mapped,
    nearest,
    surfaces,
)

VOCABULARY, CONTEXT, LETTERS = 768, 72, 90
TRAIN, TEST = 2400, 300
"""Texts of each language."""
SOURCE: dict[str, Any] = {"steps": 600, "batch_size": 16, "lr": 3e-3, "warmup": 30, "clip": 1.0}
TUNING: dict[str, Any] = {"steps": 160, "batch_size": 12, "lr": 2e-3, "warmup": 5, "clip": 1.0}
TUNED = ("tokalign relative", "tokalign cosine", "gold and mean", "random")
"""Arms that are tuned after they have begun."""
DIMENSION, PIVOTS = 96, 150
Rows = Callable[[Tensor], Tensor]


@cache
def texts(language: str) -> tuple[list[str], list[str]]:
    """Pieces of 90 letters of manual pages, of some to train on and of others to test."""
    pages = sorted(p for p in (MANUAL / language).glob("man[1-8]/*") if not p.is_symlink())
    if len(pages) < 100:
        raise StoreError(f"{len(pages)} manual pages in {MANUAL / language}: apt install manpages manpages-de")
    random.Random(0).shuffle(pages)
    found: list[list[str]] = [[], []]
    for number, page in enumerate(pages):
        part, most = found[number % 5 == 0], (TRAIN, TEST)[number % 5 == 0]
        if len(part) < most:
            text = manual(page)
            part += [text[i : i + LETTERS] for i in range(0, min(len(text), 20 * LETTERS) - LETTERS, LETTERS)]
    return found[0][:TRAIN], found[1][:TEST]


def pieces(part: int, smoke: bool, *languages: str) -> list[str]:
    return [t for language in languages for t in texts(language)[part][: 40 if smoke else None]]


@cache
def tokenizer(*languages: str) -> Any:
    """Byte-pair encoding of the texts to train on."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    encoder = Tokenizer(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    encoder.train_from_iterator([t for language in languages for t in texts(language)[0]], trainer)
    return encoder


@cache
def data(part: int, smoke: bool, *languages: str) -> dict[str, Any]:
    """The texts as T reads them, and beside that as S does."""
    return paired_tokens(pieces(part, smoke, *languages), tokenizer("", "de"), tokenizer(""), CONTEXT)


@cache
def source(smoke: bool) -> Any:
    """Two blocks of width 64, trained on both languages as the English tokenizer S reads them."""
    with rng.scope(0):
        model = DecoderLM(VOCABULARY, dim=64, depth=2, context=CONTEXT)
    steps = SMOKE_STEPS if smoke else SOURCE["steps"]
    training: dict[str, Any] = {**SOURCE, "steps": steps, "task": "language-model"}
    found: Any = transfer(Labels(), None, model, as_read_by_s(0, smoke, "", "de"), **training).model
    found.tokenizer = tokenizer("")
    return found


def as_read_by_s(part: int, smoke: bool, *languages: str) -> dict[str, Any]:
    read = paired_tokens(pieces(part, smoke, *languages), tokenizer(""), tokenizer(""), CONTEXT)
    return {"inputs": read["inputs"], "bytes": read["bytes"]}


def trial(seed: int, smoke: bool) -> Mapping[str, Numbers]:
    """Every arm gives the rows of the new tokens another beginning; some are tuned, all alike, rows first."""
    old, own = source(smoke), [bits(source(smoke), as_read_by_s(1, smoke, language)) for language in ("de", "")]
    rows, mappings = beginnings(seed, smoke)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, change in rows.items():
            moved = copy.deepcopy(old)
            change_rows(moved, change)
            moved.tokenizer = tokenizer("", "de")
            scores = [bits(moved, data(1, smoke, language)) for language in ("de", "")]
            found[name] = {
                "bits per byte": sum(scores) / 2,
                "german": scores[0],
                "english": scores[1],
                "german with the old tokens": own[0],
                "english with the old tokens": own[1],
                "german tokens for each new one": _compression(smoke),
            }
            if name in mappings:
                found[name]["bleu-1"] = _quality(mappings[name], smoke)
            if name in TUNED:
                halves = tuned(moved, name, mappings, old, Path(folder), seed, smoke)
                found[name] |= {"rows tuned": halves[0], "all tuned": halves[1]}
    return found


def tuned(moved: Any, name: str, mappings: Any, old: Any, folder: Path, seed: int, smoke: bool) -> tuple[float, float]:
    """Bits per byte of both languages after each of the two stages."""
    begun, mapping = (
        moved,
        TokenMapping(torch.arange(VOCABULARY), torch.zeros(VOCABULARY, dtype=torch.uint8), VOCABULARY),
    )
    if name in mappings:  # as a user does it, from the model with the old tokens
        begun, mapping = old, mappings[name]
    mapping.save(folder / "mapping.json")
    target = DecoderLM(VOCABULARY, dim=64, depth=2, context=CONTEXT)
    target.tokenizer = tokenizer("", "de")
    steps, between = SMOKE_STEPS if smoke else TUNING["steps"], []

    def listener(arm: str, seed: int, trainer: Any, record: Any) -> None:
        if trainer.updates == steps // 2:
            between.append(copy.deepcopy(trainer.run["target"]))

    method = TokAlign(str(folder / "mapping.json"))
    options = {**TUNING, "steps": steps, "seeds": [seed], "task": "language-model", "listener": listener}
    model = transfer(method, begun, target, data(0, smoke, "", "de"), **options).model
    first, last = ([bits(m, data(1, smoke, language)) for language in ("de", "")] for m in (between[0], model))
    return sum(first) / 2, sum(last) / 2


def beginnings(seed: int, smoke: bool) -> tuple[dict[str, Rows], dict[str, TokenMapping]]:
    """By arm, what makes the new table from the old one; and the mappings where it is one."""
    looks = surfaces(tokenizer("", "de")), surfaces(tokenizer(""))
    gold = gold_pairs(*looks)
    read = Batch(data(0, smoke, "", "de"))
    counts = [cooccurrence(real_ids(b).split(256), VOCABULARY) for b in (read, read.for_source())]
    ours, theirs = (
        glove(c, DIMENSION, 1 if smoke else 15, seed=rng.derive(seed, side)) for side, c in enumerate(counts)
    )
    spaces = {s: comparable(ours, theirs, gold, 10 if smoke else PIVOTS, s, seed) for s in SIMILARITIES}
    mappings = {f"tokalign {s}": mapped(*looks, space, gold, {}, [], seed) for s, space in spaces.items()}
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(VOCABULARY, generator=draws)
    pairs = torch.tensor(list(gold.items()))

    def mean(table: Tensor) -> Tensor:
        found = table.mean(0, keepdim=True).repeat(VOCABULARY, 1)
        found[pairs[:, 0]] = table[pairs[:, 1]]
        return found

    def neighbours(table: Tensor) -> Tensor:
        near = spaces["cosine"]
        found = mean(table)
        known = near.target_known.clone()
        known[pairs[:, 0]] = False
        ids = near.source_known.nonzero().flatten()
        scores, best = nearest(near.target[known], near.source[ids], 10)
        shares = (scores / 0.1).softmax(1)
        found[known] = torch.einsum("tn,tnd->td", shares, table[ids[best]])
        return found

    def noise(table: Tensor) -> Tensor:
        return torch.randn(table.shape, generator=draws) * table.std()

    rows: dict[str, Rows] = {name: mapping_rows(mapping) for name, mapping in mappings.items()}
    others: dict[str, Rows] = {
        "neighbours": neighbours,
        "gold and mean": mean,
        "permuted": lambda t: t[order],
        "random": noise,
    }
    return rows | others, mappings


def bits(model: Any, held_out: Any) -> float:
    read = as_data({name: held_out[name] for name in ("inputs", "bytes")})
    found = evaluate(model, read, task="language-model", batch_size=64)
    return float(found.metrics["bits_per_byte"])


def _quality(mapping: TokenMapping, smoke: bool) -> float:
    read = Batch(data(1, smoke, "de"))
    return alignment_quality(mapping, real_ids(read), real_ids(read.for_source()))


def _compression(smoke: bool) -> float:
    read = Batch(data(1, smoke, "de"))
    ours, theirs = ((real_ids(b) >= 0).sum() for b in (read, read.for_source()))
    return float(theirs / ours)


PROOF = Study(
    name="tokalign",
    proves=("TokAlign",),
    data=(
        "manual pages in English and German in pieces of 90 letters, 2,400 of each to train on and 300 of each, of "
        "other pages, to test; S is a byte-pair encoding of 768 tokens of the English ones, T of both languages"
    ),
    trial=trial,
    arms=(*(f"tokalign {s}" for s in SIMILARITIES), "neighbours", "gold and mean", "permuted", "random"),
    baseline="gold and mean",
    metric="bits per byte",
    higher_is_better=False,
    expected=(
        "Before any training TokAlign is below gold pairs with the mean row for all others, and that below random "
        "rows and permuted ones; the order holds after the first half of the training and shrinks in the second. The "
        "vanilla comparison of vectors is worse than relative ones in BLEU-1 and in bits per byte"
    ),
    notes=(
        "As expected but for the baseline: before training TokAlign (3.84 bits per byte) is level with the mean row, "
        "better in German (4.23 and 4.40) and worse in English (3.44 and 3.28). The product of representations that "
        "are not normalised has a few tokens that are everybody's nearest, which 96 dimensions and 150 pivots make "
        "worse than the paper's 300 and 300; by cosines it is 0.08 better than the mean (3.76). A mean over the ten "
        "nearest, as in WECHSEL, is best (3.63): a row that is one token's is surer than an average, and surer of "
        "what is wrong. The same shows in permuted rows (6.56), which are worse than random ones (5.23). Comparing "
        "vectors themselves is much worse (4.35), though BLEU-1 hardly says so (0.55 to 0.57), for most tokens of a "
        "text have the same bytes in both. After 80 updates of rows alone TokAlign is ahead of the mean (3.42 and "
        "3.44; random 4.09), after 80 more of everything 3.38 and 3.40 (4.03), in every seed. Half of the English is "
        "what S was made for, so the old tokens (3.64 in German, 2.56 in English) stay ahead in this budget; German "
        "takes 1.27 times fewer tokens. Four arms are tuned; the others are looked at before training only. The "
        "sheet's last part, a teacher with T that distils into the model, is not in this proof; nor are 400 updates. "
        "Nothing was tuned on validation data."
    ),
)

"""TokAlign: another vocabulary for a language model, its rows moved by a learned alignment of tokens."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from transfuse.core import rng
from transfuse.core.batch import Batch, real_tokens, token_ids
from transfuse.core.card import Card
from transfuse.core.errors import InputError, LayerError
from transfuse.core.labels import labels_term
from transfuse.core.method import Bag, Method
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Indexed
from transfuse.cotrain.vocabulary import change_rows, embedding_and_head
from transfuse.weights.glove import Vectors, cooccurrence, glove
from transfuse.weights.token_mapping import (
    KINDS,
    SIMILARITIES,
    SURFACES,
    TokenMapping,
    comparable,
    gold_pairs,
    mapped,
    roles,
    surfaces,
)

FETCH = 256
"""Texts that are read at once."""


class TokAlign(Method):
    """Give a language model the vocabulary T for its own S: rows of similar tokens, then training in two stages.

        m(t) = the token with the same bytes, else argmax_s  r_T(t) . r_S(s),   r(v) = [cos(v, p) for pivots p]
        E_T[t] = E_S[m(t)],  H_T[t] = H_S[m(t)]                     embedding and output layer; all else is copied
        stage 1: CE(next token), embedding and output layer alone;  stage 2: all parameters, at `lr_ratio`

    Vectors v are GloVe's, learned on both tokenisations of the same texts; pivots are pairs with the same bytes. Tokens
    of the same role (begin, end, padding, ...) go to each other, whatever their bytes; those too rare for a vector go
    to a source token at random, and are counted. `source=` is the model with S, `target=` one of the same shape with T,
    whose weights do not matter; both have an attribute `tokenizer`. `data=` is texts as both read them, which
    :func:`transfuse.datasets.paired_tokens` makes. Afterwards any teacher with T can teach the model.

    Args:
        mapping: file of a :class:`~transfuse.weights.token_mapping.TokenMapping` to use; None learns one.
        dimension, window, iterations, x_max, min_count: of GloVe.
        pivots: how many pairs make the two spaces comparable.
        similarity: `"relative"` (the paper's product); `"cosine"`, the same without regard to norms, which in small
            spaces keeps a few tokens from being everybody's nearest; `"vanilla"`, of GloVe's vectors themselves.
        match: tokens are the same by their `"bytes"`, or by the `"strings"` of their tokenizers, where markers of
            spaces may differ.
        first: share of the training that stage 1 takes, in (0, 1).
        lr_ratio: learning rate of stage 2, as a factor of the caller's.

    Raises:
        InputError: an argument is out of range, a model does not say what its ids mean, the data is not paired, or
            there are fewer pairs than pivots.
        LayerError: source and target are not of one shape but for their vocabularies.
        StoreError: the file of the mapping cannot be read.

    Source: Li, Zhang & Zong, ACL 2025, arXiv:2506.03523.
    """

    card = Card(
        paper="Li, Zhang & Zong, ACL 2025",
        arxiv="2506.03523",
        sheet=109,
        carries="weights",
        teacher="weights",
        data="unlabelled",
        tasks=("language-model",),
    )
    family = "weights"

    def __init__(
        self,
        mapping: str | None = None,
        dimension: int = 300,
        window: int = 15,
        iterations: int = 15,
        x_max: float = 10.0,
        min_count: int = 5,
        pivots: int = 300,
        similarity: str = "relative",
        match: str = "bytes",
        first: float = 0.5,
        lr_ratio: float = 5 / 64,
    ):
        super().__init__()
        whole = {"dimension": dimension, "window": window, "iterations": iterations, "pivots": pivots}
        for name, value in whole.items():
            if value < 1:
                raise InputError(f"TokAlign: {name} is {value}, it must be at least 1")
        if similarity not in SIMILARITIES or match not in SURFACES:
            raise InputError(
                f"TokAlign: similarity is {similarity!r} and match {match!r}, expected one of {', '.join(SIMILARITIES)}"
                f" and one of {', '.join(SURFACES)}"
            )
        if not 0 < first < 1 or not lr_ratio > 0 or not x_max > 0:
            raise InputError("TokAlign: first must be between 0 and 1, lr_ratio and x_max positive")
        self.mapping, self.dimension, self.window, self.iterations = mapping, dimension, window, iterations
        self.x_max, self.min_count, self.pivots, self.similarity = x_max, min_count, pivots, similarity
        self.match, self.first, self.lr_ratio = match, first, lr_ratio
        self.found = Bag()

    def setup(self, run: Run, sample: Batch | None) -> None:
        if run.shuffled:
            raise InputError("TokAlign reads weights, not outputs, so there is no shuffled arm")
        data = run.data.get("data")
        if sample is None or not isinstance(data, Indexed) or "source" not in sample:
            raise InputError(
                "TokAlign reads texts as both tokenizers read them: pass data=paired_tokens(texts, target's, source's)"
            )
        for role in ("source", "target"):
            if getattr(run[role], "tokenizer", None) is None:
                raise InputError(f"nothing says what the ids of {role} mean: set its attribute `tokenizer`")
        source, target = (run[role].state_dict() for role in ("source", "target"))
        tables = {id(p) for role in ("source", "target") for p in _tables(run[role])}
        kept = {n for role in ("source", "target") for n, p in run[role].named_parameters() if id(p) not in tables}
        tied = [len(_tables(run[role])) for role in ("source", "target")]
        wrong = source.keys() ^ target.keys() | {n for n in kept if source[n].shape != target[n].shape}
        if wrong or tied[0] != tied[1]:
            raise LayerError(
                "source and target must be one network but for their vocabularies, embeddings tied or not on both "
                f"sides; they differ in {', '.join(sorted(wrong)[:5]) or 'whether they are tied'}"
            )

    def begin_stage(self, i: int, run: Run) -> bool:
        if i == 0:
            mapping = TokenMapping.load(self.mapping) if self.mapping else self.align(run)
            sizes = [embedding_and_head(run[role])[0].num_embeddings for role in ("target", "source")]
            if [len(mapping.source), mapping.source_size] != sizes:
                raise InputError(
                    f"the mapping is from {len(mapping.source)} to {mapping.source_size} tokens, the models have "
                    f"{sizes[0]} and {sizes[1]}"
                )
            self.found["source"], self.found["kinds"] = mapping.source, mapping.kinds
            moved = copy.deepcopy(run["source"])
            change_rows(moved, mapping_rows(mapping))
            run["target"].load_state_dict(moved.state_dict())
        return i < 2

    def align(self, run: Run) -> TokenMapping:
        """Learn which source token takes the place of each target token, from the data."""
        vectors = {role: self._vectors(run, role) for role in ("target", "source")}
        tokenizers = {role: run[role].tokenizer for role in vectors}
        looks = {role: surfaces(tokenizer, self.match) for role, tokenizer in tokenizers.items()}
        special: dict[str, dict[str, int]] = {role: roles(tokenizer) for role, tokenizer in tokenizers.items()}
        gold = gold_pairs(looks["target"], looks["source"])
        seed = rng.derive(run.seed, "TokAlign")
        spaces = comparable(vectors["target"], vectors["source"], gold, self.pivots, self.similarity, seed)
        same_role = {i: special["source"][name] for name, i in special["target"].items() if name in special["source"]}
        excluded = list(special["source"].values())
        return mapped(looks["target"], looks["source"], spaces, gold, same_role, excluded, seed)

    def _vectors(self, run: Run, role: str) -> Vectors:
        data = run.data["data"]
        assert isinstance(data, Indexed)

        def texts() -> Any:
            for rows in torch.arange(data.size).split(FETCH):
                batch = data.fetch(rows)
                yield real_ids(batch.for_source() if role == "source" else batch)

        size = embedding_and_head(run[role])[0].num_embeddings
        seed = rng.derive(run.seed, "GloVe", role)
        counts = cooccurrence(texts(), size, self.window)
        return glove(counts, self.dimension, self.iterations, self.x_max, self.min_count, seed=seed)

    def stage(self, i: int, run: Run) -> Stage:
        target = run["target"]
        if i == 0:
            phase, share = Phase("rows", self.losses, _tables(target)), self.first
        else:
            group = {"params": list(target.parameters()), "lr_scale": self.lr_ratio}
            phase, share = Phase("all", self.losses, [group]), 1 - self.first
        return Stage({"data": run.data["data"]}, [phase], share=share)

    def losses(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        return {"labels": labels_term(run("target", batch).learning, batch)}

    def panels(self) -> list[dict[str, Any]]:
        if "kinds" not in self.found:
            return []
        counts = torch.bincount(self.found["kinds"].long(), minlength=len(KINDS)).tolist()
        note = "Where each target token has its row from. Those at random were too rare to be aligned."
        values = [[float(count) for count in counts]]
        return [
            {
                "kind": "bars",
                "title": "Tokens",
                "note": note,
                "rows": ["tokens"],
                "groups": list(KINDS),
                "values": values,
            }
        ]


def mapping_rows(mapping: TokenMapping) -> Any:
    """From the source's table to the target's."""
    return lambda table: table[mapping.source.to(table.device)]


def real_ids(batch: Batch) -> Tensor:
    """The token ids of a batch, -1 at padding."""
    return token_ids(batch).masked_fill(~real_tokens(batch), -1)


def _tables(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Weights that have a row per token: of the embedding, and of the output layer where they are not tied."""
    embedding, head = embedding_and_head(model)
    found: list[Any] = [embedding.weight, head.weight, head.bias]
    return list({id(p): p for p in found if p is not None}.values())

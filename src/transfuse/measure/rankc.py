"""RankC: whether a multilingual model ranks the candidates for a fact alike in two languages, right or wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from transfuse.core.card import Card
from transfuse.core.errors import InputError, ShapeError, nearest
from transfuse.measure.base import Measure, Measurement, Table
from transfuse.measure.candidates import Cloze
from transfuse.measure.correlation import pearson, spearman
from transfuse.measure.interval import bootstrap

Facts = Mapping[str, Sequence[Cloze]]
"""Language -> the same facts in the same order, with the candidates translated position by position."""
Scorer = Callable[[Sequence[Cloze]], Sequence[Tensor]]
WEIGHTS = ("softmax", "linear", "squared")


class RankC(Measure):
    """Measure how alike a model ranks the candidates for the same facts in two languages.

    R_i^l: the candidates of fact i, best first, in language l, as positions in the shared list of N candidates
    P@j = |top_j(R_i^l) and top_j(R_i^l')| / j,   w_j = exp(N - j) / sum_k exp(N - k)
    RankC(l, l') = mean over i of sum_j w_j P@j

    It is symmetric, lies in [w_N, 1], does not look at the right answers, and counts every fact: leaving out those
    that are answered wrongly would make it depend on accuracy.

    `measure(source=scorer, data=facts)`: a scorer is a :class:`~transfuse.measure.candidates.CandidateScorer` or any
    function from sentences to one score per candidate (lower is better); facts are `{language: [Cloze, ...]}`. With
    `target=` another scorer, its languages are the columns: how alike two models rank.

    Numbers: the mean over pairs of different languages (over all pairs with two models), and what a random ranking
    gives. Tables: `rankc` with `low` and `high` (bootstrap over facts), `overlap` (right answers that are ranked on
    top in both languages, as a share of those in either) and `accuracy` (right answers among as many on top).

    Args:
        weights: of the ranks: `"softmax"` as above, `"linear"` (N - j + 1) or `"squared"`, normalised.
        draws: of the bootstrap.

    Raises:
        InputError: unknown weights; (in `measure`) languages with different facts or numbers of candidates, or
            something else than a scorer.

    Source: Qi, Fernández and Bisazza, EMNLP 2023, arXiv:2310.10378.
    """

    card = Card(
        paper="Qi et al., EMNLP 2023",
        arxiv="2310.10378",
        sheet=81,
        carries="outputs",
        teacher="topk",
        data="labelled",
        tasks=("language-model",),
    )

    def __init__(self, weights: str = "softmax", draws: int = 1000):
        if weights not in WEIGHTS:
            raise InputError(f"unknown weights {weights!r}: {nearest(weights, WEIGHTS)}")
        self.weights, self.draws = weights, draws

    def look(self, source: Any, target: Any, data: Any) -> Measurement:
        facts = check_facts(data)
        rows = _scored(source, facts, "source")
        columns = rows if target is None else _scored(target, facts, "target")
        names = tuple(facts)
        golds = [cloze.golds for cloze in facts[names[0]]]
        rankc, low, high, overlap = (torch.zeros(len(names), len(names), dtype=torch.float64) for _ in range(4))
        for i, one in enumerate(names):
            for j, other in enumerate(names):
                per_fact = consistency(rows[one], columns[other], self.weights)
                interval = bootstrap(per_fact[None], draws=self.draws)
                rankc[i, j], low[i, j], high[i, j] = interval.mean, interval.low, interval.high
                both, either = _right(rows[one], golds), _right(columns[other], golds)
                overlap[i, j] = float((both & either).sum() / (both | either).sum().clamp(min=1))
        accuracy = torch.stack([_right(scores[n], golds).double().mean() for scores in (rows, columns) for n in names])
        pairs = torch.ones_like(rankc, dtype=torch.bool) if target is not None else ~torch.eye(len(names)).bool()
        sizes = [len(cloze.candidates) for cloze in facts[names[0]]]
        return Measurement(
            measure=repr(self),
            numbers={
                "rankc": float(rankc[pairs].mean()),
                "chance": sum(chance(size, self.weights) for size in sizes) / len(sizes),
                "facts": float(len(sizes)),
            },
            tables={
                "rankc": Table(names, names, rankc),
                "low": Table(names, names, low),
                "high": Table(names, names, high),
                "overlap": Table(names, names, overlap),
                "accuracy": Table(names, ("source", "target"), accuracy.view(2, -1).T),
            },
            notes=("consistent rankings need not be right: see the accuracy",),
        )


def consistency(one: Sequence[Tensor], other: Sequence[Tensor], weights: str = "softmax") -> Tensor:
    """How alike two lists of scores rank the candidates of each fact, `(facts,)` in [0, 1].

    Args:
        one, other: for each fact the scores of its candidates, `(candidates,)`, lower is better. Equal scores rank in
            the order of the candidates.
        weights: see :class:`RankC`.

    Raises:
        ShapeError: different numbers of facts, or of candidates for a fact.
        InputError: a score is NaN.
    """
    if len(one) != len(other) or any(a.shape != b.shape for a, b in zip(one, other, strict=False)):
        raise ShapeError(
            "both sides need the same facts with the same number of candidates, found "
            f"{len(one)} and {len(other)} facts with {[len(s) for s in one][:5]} and {[len(s) for s in other][:5]} "
            "candidates"
        )
    found = []
    for a, b in zip(one, other, strict=True):
        # A candidate is in both top-j lists from the worse of its two ranks on.
        worse = torch.maximum(_ranks(a), _ranks(b))
        shared = worse.bincount(minlength=len(a)).cumsum(0)
        found.append((rank_weights(len(a), weights) * shared / torch.arange(1, len(a) + 1)).sum())
    return torch.stack(found)


def rank_weights(candidates: int, weights: str = "softmax") -> Tensor:
    """w_1, ..., w_N in float64: they fall from the first rank to the last and add up to 1."""
    rank = torch.arange(candidates, 0, -1, dtype=torch.float64)
    if weights == "softmax":
        return rank.softmax(dim=0)
    power = rank if weights == "linear" else rank**2
    return power / power.sum()


def chance(candidates: int, weights: str = "softmax") -> float:
    """What two unrelated rankings give on average: `sum_j w_j j / N`."""
    return float((rank_weights(candidates, weights) * torch.arange(1, candidates + 1)).sum() / candidates)


def determinants(rankc: Table, factors: Mapping[str, Table]) -> Table:
    """How consistency goes along with properties of pairs of languages: columns `"pearson"` and `"spearman"`.

    Args:
        rankc: one model, languages by languages.
        factors: name -> the same languages by the same languages: shared vocabulary, distance, mean accuracy, ...

    Raises:
        ShapeError: a factor is about other languages.
    """
    above = torch.triu(torch.ones_like(rankc.values), diagonal=1).bool()
    rows = []
    for name, factor in factors.items():
        if (factor.rows, factor.columns) != (rankc.rows, rankc.columns):
            raise ShapeError(f"{name!r} is about {factor.rows}, and the consistency about {rankc.rows}")
        x, y = rankc.values[above], factor.values[above]
        rows.append([pearson(x, y), spearman(x, y)])
    return Table(tuple(factors), ("pearson", "spearman"), torch.tensor(rows, dtype=torch.float64))


def edit_shift(before: Sequence[Tensor], after: Sequence[Tensor], new: Sequence[int], old: Sequence[int]) -> Tensor:
    """How far an edit of a model moved each fact from the old answer to the new one, `(facts,)`.

    `(score of old - score of new)` after the edit less the same before it; with scores that are negative
    log-likelihoods of one token this is the change of `logit(new) - logit(old)`. Correlated over languages with RankC
    before the edit, it says whether an edit made in one language arrives in others where rankings agree.

    Args:
        before, after: scores of the candidates in one language, as a scorer gives them.
        new, old: for each fact the candidate that the edit put in, and the one it displaced.
    """

    def preference(scores: Sequence[Tensor]) -> Tensor:
        return torch.stack([s[o] - s[n] for s, n, o in zip(scores, new, old, strict=True)])

    return preference(after) - preference(before)


def check_facts(data: Any) -> Facts:
    """The facts, after checking that languages can be compared position by position.

    Raises:
        InputError: fewer than one language, or languages with other facts, numbers of candidates, or right answers.
    """
    if not isinstance(data, Mapping) or not data:
        raise InputError(f"the data of RankC is {{language: [Cloze, ...]}}, found a {type(data).__name__}")
    first, clozes = next(iter(data.items()))
    if not clozes or not all(isinstance(c, Cloze) for language in data.values() for c in language):
        raise InputError("each language of RankC has a list of Cloze")
    for language, others in data.items():
        if len(others) != len(clozes):
            raise InputError(f"{first!r} has {len(clozes)} facts and {language!r} {len(others)}: they must be the same")
        for number, (one, other) in enumerate(zip(clozes, others, strict=True)):
            if (len(one.candidates), set(one.golds)) != (len(other.candidates), set(other.golds)):
                raise InputError(
                    f"fact {number} has {len(one.candidates)} candidates with {sorted(one.golds)} right in {first!r}, "
                    f"and {len(other.candidates)} with {sorted(other.golds)} right in {language!r}: candidates are "
                    "translated position by position"
                )
    return data


def _scored(scorer: Any, facts: Facts, role: str) -> dict[str, Sequence[Tensor]]:
    if not callable(scorer) or isinstance(scorer, torch.nn.Module | type):
        raise InputError(
            f"the {role} of RankC scores candidates: CandidateScorer(model, tokenizer) or a function of a list of "
            f"Cloze, found a {type(scorer).__name__}"
        )
    return {language: scorer(clozes) for language, clozes in facts.items()}


def _ranks(scores: Tensor) -> Tensor:
    """The rank of each candidate, 0 for the lowest score."""
    if scores.isnan().any():
        raise InputError("a candidate's score is NaN: find out why before ranking")
    return scores.cpu().argsort(stable=True).argsort()


def _right(scores: Sequence[Tensor], golds: Sequence[Sequence[int]]) -> Tensor:
    """For every right answer of every fact, whether it is among as many on top, `(golds,)`."""
    found = [_ranks(s)[list(gold)] < len(gold) for s, gold in zip(scores, golds, strict=True)]
    return torch.cat(found)

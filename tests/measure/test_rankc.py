from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transfuse.core.errors import InputError, ShapeError
from transfuse.measure import Cloze, RankC, Table, read_facts
from transfuse.measure.rankc import chance, consistency, determinants, edit_shift, rank_weights

DRAW = torch.Generator().manual_seed(0)


def scores(*ranking: int) -> Tensor:
    """Scores under which the candidates are ranked like this."""
    found = torch.zeros(len(ranking))
    found[list(ranking)] = torch.arange(len(ranking)).float()
    return found


def rankc(one: Tensor, other: Tensor, weights: str = "softmax") -> float:
    return consistency([one], [other], weights).item()


def by_definition(one: Tensor, other: Tensor) -> float:
    n = len(one)
    a, b = (sorted(range(n), key=lambda i, s=s: float(s[i])) for s in (one, other))
    total = sum(math.exp(n - k) for k in range(1, n + 1))
    return sum(math.exp(n - j) / total * len(set(a[:j]) & set(b[:j])) / j for j in range(1, n + 1))


class TestConsistency:
    def test_agrees_with_its_definition(self) -> None:
        for n in (1, 2, 5, 9):
            for _ in range(20):
                one, other = torch.rand(2, n, generator=DRAW)
                assert rankc(one, other) == pytest.approx(by_definition(one, other), abs=1e-12)

    def test_identical_rankings_and_single_candidates_give_one(self) -> None:
        assert rankc(scores(2, 0, 1), scores(2, 0, 1)) == pytest.approx(1)
        assert rankc(scores(0), scores(0)) == pytest.approx(1)

    def test_worked_cases(self) -> None:
        assert rankc(scores(0, 1), scores(1, 0)) == pytest.approx(1 / (1 + math.e), abs=1e-6)
        assert rankc(scores(0, 1, 2), scores(2, 1, 0)) == pytest.approx(0.212395, abs=1e-6)

    def test_is_symmetric_and_at_least_the_last_weight(self) -> None:
        for _ in range(50):
            one, other = torch.rand(2, 7, generator=DRAW)
            assert rankc(one, other) == pytest.approx(rankc(other, one), abs=1e-12)
            assert rankc(one, other) >= float(rank_weights(7)[-1]) - 1e-12

    def test_names_of_candidates_and_monotone_changes_of_scores_do_not_matter(self) -> None:
        one, other = torch.rand(2, 8, generator=DRAW)
        order = torch.randperm(8, generator=DRAW)
        assert rankc(one[order], other[order]) == pytest.approx(rankc(one, other))
        assert rankc(one.exp(), 5 * other**3) == pytest.approx(rankc(one, other))

    def test_random_rankings_match_the_closed_form(self) -> None:
        one, other = torch.rand(2, 5000, 10, generator=DRAW)
        found = consistency(list(one), list(other))
        assert abs(found.mean() - chance(10)) < 3 * found.std() / math.sqrt(5000)
        weights = rank_weights(10)
        assert chance(10) == pytest.approx(sum(float(w) * j / 10 for j, w in enumerate(weights, start=1)))

    def test_weights_are_finite_for_many_candidates(self) -> None:
        for weights in ("softmax", "linear", "squared"):
            found = rank_weights(1000, weights)
            assert found.isfinite().all() and found.sum().item() == pytest.approx(1)
        one, other = torch.rand(2, 1000, generator=DRAW)
        assert 0 <= rankc(one, other) <= 1

    def test_other_weights(self) -> None:
        assert rank_weights(3, "linear").tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6])
        assert rank_weights(3, "squared").tolist() == pytest.approx([9 / 14, 4 / 14, 1 / 14])

    def test_ties_are_broken_by_position(self) -> None:
        assert rankc(torch.zeros(5), scores(0, 1, 2, 3, 4)) == pytest.approx(1)

    def test_other_candidates_are_refused(self) -> None:
        with pytest.raises(ShapeError, match="same number of candidates"):
            consistency([torch.rand(3)], [torch.rand(4)])
        with pytest.raises(ShapeError, match="1 and 2 facts"):
            consistency([torch.rand(3)], [torch.rand(3)] * 2)
        with pytest.raises(InputError, match="NaN"):
            consistency([torch.tensor([0.0, torch.nan])], [torch.rand(2)])


def facts(count: int = 40, **translated: Any) -> dict[str, list[Cloze]]:
    words = {"en": "abcdef", "de": "uvwxyz"} | translated
    return {
        language: [Cloze(f"{i} is <mask>.", tuple(letters), (i % len(letters),)) for i in range(count)]
        for language, letters in words.items()
    }


class Believes:
    """Ranks by a fixed preference per prompt and position, other in German for a share of the facts."""

    def __init__(self, apart: float):
        self.apart = apart

    def __call__(self, clozes: Any) -> list[Tensor]:
        found = []
        for i, cloze in enumerate(clozes):
            own = "de" if cloze.candidates[0] == "u" and i < self.apart * len(clozes) else "en"
            seed = i + (1000 if own == "de" else 0)
            found.append(torch.rand(len(cloze.candidates), generator=torch.Generator().manual_seed(seed)))
        return found


class TestMeasure:
    def test_is_one_where_languages_rank_alike_and_chance_where_they_do_not(self) -> None:
        found = RankC(draws=100).measure(source=Believes(0), data=facts())
        assert found["rankc"] == pytest.approx(1) and found.tables["rankc"]["en", "de"] == pytest.approx(1)
        apart = RankC(draws=500).measure(source=Believes(1), data=facts(400))
        low, high = (apart.tables[t]["en", "de"] for t in ("low", "high"))
        assert low < apart["rankc"] < high and low - 0.03 < apart["chance"] < high + 0.03

    def test_more_shared_facts_are_more_consistent_and_the_table_is_symmetric(self) -> None:
        values = [RankC(draws=1).measure(source=Believes(a), data=facts())["rankc"] for a in (1, 0.75, 0.5, 0.25, 0)]
        assert values == sorted(values) and values[0] < values[-1] - 0.3
        table = RankC(draws=1).measure(source=Believes(0.5), data=facts()).tables["rankc"].values
        assert torch.allclose(table, table.T) and torch.allclose(table.diagonal(), torch.ones(2, dtype=torch.float64))

    def test_does_not_look_at_the_right_answers(self) -> None:
        other = {k: [Cloze(c.prompt, c.candidates, (0,)) for c in v] for k, v in facts().items()}
        one, two = (RankC(draws=1).measure(source=Believes(0.5), data=d) for d in (facts(), other))
        assert one["rankc"] == two["rankc"] and one.tables["accuracy"]["en", "source"] != 1

    def test_accuracy_and_overlap_count_right_answers(self) -> None:
        def knows(clozes: Any) -> list[Tensor]:  # right in English for the first 3 facts of 4, in German for the last 3
            spared = 3 if clozes[0].candidates[0] == "a" else 0
            return [
                torch.arange(6).ne(c.golds[0]).float() if i != spared else torch.arange(6).eq(c.golds[0]).float()
                for i, c in enumerate(clozes)
            ]

        found = RankC(draws=1).measure(source=knows, data=facts(4))
        assert found.tables["accuracy"].column("source") == {"en": 0.75, "de": 0.75}
        assert found.tables["overlap"]["en", "de"] == pytest.approx(2 / 4)

    def test_two_models_are_compared_language_by_language(self) -> None:
        found = RankC(draws=1).measure(source=Believes(0), target=Believes(1), data=facts())
        table = found.tables["rankc"]
        assert table["en", "en"] == pytest.approx(1) and table["de", "en"] == pytest.approx(1)
        assert table["en", "de"] < 0.9

    def test_is_json_and_says_what_chance_is(self) -> None:
        found = RankC(draws=10).measure(source=Believes(0.5), data=facts())
        read = json.loads(json.dumps(found.as_dict()))
        assert read["tables"]["rankc"]["rows"] == ["en", "de"] and 0 < read["numbers"]["chance"] < 1
        assert read["measure"] == "RankC(draws=10)"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"source": torch.nn.Linear(1, 1)}, "the source of RankC scores candidates.*found a Linear"),
            ({"source": facts()}, "the source of RankC scores candidates.*found a dict"),
            ({"data": [1]}, "the data of RankC is {language"),
            ({"data": facts(de="uvwxy")}, "6 candidates with .* right in 'en', and 5"),
            ({"data": facts() | {"fr": facts(3)["en"]}}, "'en' has 40 facts and 'fr' 3"),
            (
                {"data": {"en": [Cloze("<mask>", ("a", "b"), (0,))], "de": [Cloze("<mask>", ("a", "b"), (1,))]}},
                "right in",
            ),
        ],
    )
    def test_wrong_roles_are_refused(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            RankC().measure(**({"source": Believes(0), "data": facts()} | arguments))

    def test_roles_are_given_by_name(self) -> None:
        with pytest.raises(TypeError):
            RankC().measure(Believes(0), None, facts())  # type: ignore[misc]

    def test_unknown_weights_are_refused(self) -> None:
        with pytest.raises(InputError, match="did you mean 'linear'"):
            RankC(weights="liner")


class TestFacts:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("no gap", ("a", "b"), (0,)), "has the gap <mask> once"),
            (("<mask> <mask>", ("a", "b"), (0,)), "has the gap <mask> once"),
            (("<mask>", ("a", "b", "a"), (0,)), "'a' .* is there twice"),
            (("<mask>", ("a", "b"), (2,)), "needs its right answers among its 2"),
        ],
    )
    def test_a_cloze_is_checked(self, arguments: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            Cloze(*arguments)

    def test_files_are_read_and_doubled_translations_left_out_everywhere(self, tmp_path: Path) -> None:
        head = "Prompt\tAns\tCandidate Ans\n"
        (tmp_path / "en").write_text(head + "Paris is in <mask>.\tFrance\tFrance, Spain\nX is <mask>.\tb, c\ta, b, c\n")
        (tmp_path / "de").write_text(
            head + "Paris ist in <mask>.\tGallien\tGallien, Iberien\nX ist <mask>.\tb\ta, b, b\n"
        )
        found, dropped = read_facts({"en": tmp_path / "en", "de": tmp_path / "de"})
        assert dropped == 1
        assert found["de"] == [Cloze("Paris ist in <mask>.", ("Gallien", "Iberien"), (0,))]
        (tmp_path / "de").write_text(head)
        with pytest.raises(InputError, match="must have the same facts"):
            read_facts({"en": tmp_path / "en", "de": tmp_path / "de"})


def test_determinants_are_correlations_over_pairs() -> None:
    draw = torch.rand(5, 5, generator=DRAW).double()
    symmetric = draw + draw.T
    names = tuple("abcde")
    one = Table(names, names, symmetric)
    found = determinants(
        one, {"same": Table(names, names, 2 * symmetric + 1), "far": Table(names, names, -(symmetric**3))}
    )
    assert found["same", "pearson"] == pytest.approx(1) and found["far", "spearman"] == pytest.approx(-1)
    with pytest.raises(ShapeError, match="'x' is about"):
        determinants(one, {"x": Table(("a",), ("b",), torch.zeros(1, 1))})


def test_an_edit_shifts_preference_from_the_old_to_the_new_answer() -> None:
    before, after = [torch.tensor([1.0, 2.0, 3.0])], [torch.tensor([1.5, 2.0, 1.0])]
    assert edit_shift(before, after, new=[2], old=[0]).tolist() == [(1.5 - 1.0) - (1.0 - 3.0)]

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from proofs.__main__ import app
from proofs.evidence import gather
from proofs.proof import HERE, Proof, find, names
from proofs.result import ProofResult
from proofs.runner import RESULTS, run
from proofs.study import Study
from proofs.table import page
from transfuse.core import catalogue
from transfuse.core.errors import InputError, StoreError

Content = dict[str, Any]


@pytest.fixture
def content() -> Content:
    """A result as JSON: two seeds of a method, its baseline and its control."""
    values = {"KD()": (0.9, 0.92), "scratch": (0.8, 0.82), "shuffled teacher": (0.5, 0.52)}
    return {
        "name": "kd",
        "sheet": None,
        "family": "distill",
        "proves": ["KD"],
        "method": "KD()",
        "data": "digits",
        "source": {"name": "MLP", "value": 0.97, "metrics": {"accuracy": 0.97}},
        "training": {"epochs": 3, "lr": 0.01},
        "metric": "accuracy",
        "higher_is_better": True,
        "baseline": "scratch",
        "runs": [
            {"seed": seed, "arm": arm, "value": value, "seconds": 1.5}
            for arm, both in values.items()
            for seed, value in enumerate(both)
        ],
        "gain": {"mean": 0.1, "low": 0.08, "high": 0.12},
        "gains": {
            "scratch": {"mean": 0.1, "low": 0.08, "high": 0.12},
            "shuffled teacher": {"mean": 0.4, "low": 0.3, "high": 0.5},
        },
        "verdict": "arrived",
        "expected": "KD > scratch",
        "notes": "As expected.",
        "machine": {"cpu": "a processor", "cores": 2, "memory_gb": 8.0, "accelerator": None},
        "versions": {"torch": "2.6"},
        "commit": "0123456789abcdef",
        "date": "2026-11-21",
    }


# The schema --------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_again(content: Content, tmp_path: Path) -> None:
    result = ProofResult.model_validate(content)
    result.write(tmp_path / "kd.json")
    assert ProofResult.read(tmp_path / "kd.json") == result
    content["runs"] = [{**run, "metrics": {}} for run in content["runs"]]
    assert json.loads((tmp_path / "kd.json").read_text()) == content


def test_an_exported_schema_accepts_a_result_and_refuses_one_with_another_key(content: Content) -> None:
    schema = ProofResult.model_json_schema()
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError, match="surprise"):
        jsonschema.validate({**content, "surprise": 1}, schema)


@pytest.mark.parametrize("key", ["runs", "gain", "verdict", "expected", "machine", "commit", "sheet"])
def test_a_result_without_a_required_key_is_refused(content: Content, key: str) -> None:
    del content[key]
    with pytest.raises(ValueError, match=key):
        ProofResult.model_validate(content)


def test_a_seed_that_one_arm_lacks_is_refused(content: Content) -> None:
    del content["runs"][-1]
    with pytest.raises(ValueError, match="every seed"):
        ProofResult.model_validate(content)


def test_a_seed_that_is_there_twice_is_refused(content: Content) -> None:
    content["runs"].append(content["runs"][-1])
    with pytest.raises(ValueError, match="exactly once"):
        ProofResult.model_validate(content)


def test_a_gain_that_is_not_over_the_baseline_is_refused(content: Content) -> None:
    content["baseline"] = "shuffled teacher"
    with pytest.raises(ValueError, match="baseline"):
        ProofResult.model_validate(content)


def test_an_arm_without_a_gain_is_refused(content: Content) -> None:
    del content["gains"]["shuffled teacher"]
    with pytest.raises(ValueError, match="each other arm"):
        ProofResult.model_validate(content)


def test_a_value_that_is_not_finite_is_refused(content: Content) -> None:
    content["runs"][0]["value"] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        ProofResult.model_validate(content)


def test_a_file_that_is_no_result_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"absent\.json"):
        ProofResult.read(tmp_path / "absent.json")
    (tmp_path / "cut.json").write_text('{"name": "k')
    with pytest.raises(InputError, match=r"cut\.json"):
        ProofResult.read(tmp_path / "cut.json")


# The table ---------------------------------------------------------------------------------------------------------


def test_the_page_has_a_row_with_gain_interval_and_verdict(content: Content) -> None:
    assert (
        "| [KD](#kd) | digits | `scratch` | accuracy | +0.1000 [+0.0800, +0.1200] | arrived |"
        in page([ProofResult.model_validate(content)]).splitlines()
    )


def test_the_page_has_every_arm_with_its_mean_its_seeds_and_the_gain_over_it(content: Content) -> None:
    lines = page([ProofResult.model_validate(content)]).splitlines()
    assert "| `KD()` | 0.9100 | 0.9000, 0.9200 |  |" in lines
    assert "| `scratch` | 0.8100 | 0.8000, 0.8200 | +0.1000 [+0.0800, +0.1200] |" in lines
    assert "| `shuffled teacher` | 0.5100 | 0.5000, 0.5200 | +0.4000 [+0.3000, +0.5000] |" in lines


def test_the_page_says_what_was_expected_and_noted(content: Content) -> None:
    lines = page([ProofResult.model_validate(content)]).splitlines()
    assert "- expected: KD > scratch" in lines
    assert "- notes: As expected." in lines
    content["notes"] = ""
    assert "notes" not in page([ProofResult.model_validate(content)])


def test_a_bar_in_a_name_does_not_end_its_cell(content: Content) -> None:
    content["data"] = "a|b"
    assert r"| a\|b |" in page([ProofResult.model_validate(content)])


# The runner --------------------------------------------------------------------------------------------------------


def test_a_proof_runs_from_end_to_end() -> None:
    """One here; all of them are a step of CI of its own."""
    proof = find("kd")
    result = run(proof, smoke=True)
    assert (result.name, result.family) == ("kd", proof.family)
    assert result.arms == proof.arms
    assert result.seeds == [proof.seeds[0]]
    scored = [value * 128 for arm in result.arms for value in result.values(arm)]
    assert all(value.is_integer() for value in scored), "a smoke run tests 128 samples"


def test_gains_are_differences_of_the_arms_means() -> None:
    result = run(find("kd"), smoke=True)
    for arm, gain in result.gains.items():
        assert gain.mean == pytest.approx(result.average(result.method) - result.average(arm))


def study(**changes: Any) -> Study:
    known = {
        "name": "kd",
        "proves": ("KD",),
        "data": "none",
        "trial": lambda seed, smoke: {"ours": {"rank": 0.5 + seed / 10, "other": 1.0}, "theirs": {"rank": seed / 10}},
        "arms": ("ours", "theirs"),
        "baseline": "theirs",
        "metric": "rank",
        "expected": "ours > theirs",
    }
    return Study(**(known | changes))


def test_a_study_is_judged_over_its_seeds() -> None:
    result = run(study())
    assert result.values("ours") == pytest.approx([0.5, 0.6, 0.7])
    assert (result.gain.mean, result.verdict) == (pytest.approx(0.5), "arrived")
    assert result.runs[0].metrics == {"other": 1.0}
    assert "- source" not in page([result])


def test_a_study_whose_metric_is_an_error_gains_when_it_falls() -> None:
    result = run(study(higher_is_better=False))
    assert (result.gain.mean, result.verdict) == (pytest.approx(-0.5), "negative transfer")


def test_a_trial_that_forgets_an_arm_is_refused() -> None:
    with pytest.raises(InputError, match="its trial returned"):
        run(study(trial=lambda seed, smoke: {"ours": 1.0}))


def test_a_study_without_its_baseline_is_refused() -> None:
    with pytest.raises(InputError, match="baseline of 'kd'"):
        study(baseline="ours")


def test_a_smoke_run_leaves_the_committed_results_alone() -> None:
    before = {path: path.read_bytes() for path in RESULTS.iterdir()}
    done = CliRunner().invoke(app, ["run", "kd", "--smoke"])
    assert done.exit_code == 0, done.output
    assert {path: path.read_bytes() for path in RESULTS.iterdir()} == before


def test_a_result_goes_where_out_says(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["run", "kd", "--smoke", "--out", str(tmp_path / "here.json")])
    assert done.exit_code == 0, done.output
    assert ProofResult.read(tmp_path / "here.json").name == "kd"


def test_annotate_changes_the_notes_and_nothing_else(
    content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proofs.__main__.RESULTS", tmp_path)
    before = ProofResult.model_validate({**content, "notes": "an old note"})
    before.write(tmp_path / "kd.json")
    done = CliRunner().invoke(app, ["annotate", "kd"])
    assert done.exit_code == 0, done.output
    after = ProofResult.read(tmp_path / "kd.json")
    assert after == before.model_copy(update={"notes": find("kd").notes})


@pytest.mark.parametrize("arguments", [[], ["kd", "--all"], ["--all", "--out", "x.json"]])
def test_run_wants_one_name_or_all(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["run", *arguments]).exit_code == 2


def test_an_unknown_proof_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="hints"):
        find("hint")


def test_a_baseline_that_is_no_arm_is_refused() -> None:
    known = vars(find("kd"))
    with pytest.raises(InputError, match="finetune"):
        Proof(**{**known, "baseline": "finetune"})


def test_a_proof_of_an_unknown_method_is_refused() -> None:
    known = vars(find("kd"))
    with pytest.raises(InputError, match="KDD"):
        Proof(**{**known, "proves": ("KDD",)})


# What is committed -------------------------------------------------------------------------------------------------


def test_every_method_of_the_catalogue_has_a_proof() -> None:
    proven = {method for name in names() for method in find(name).proves}
    assert {e.name for e in catalogue.entries() if not e.card.control} == proven


@pytest.mark.parametrize("name", names())
def test_a_proof_is_declared_where_its_name_and_family_say(name: str) -> None:
    proof = find(name)
    assert proof.name == name
    assert (HERE / proof.family / f"{name}.py").exists()


@pytest.mark.parametrize("name", names())
def test_the_committed_result_has_every_seed_of_every_declared_arm(name: str) -> None:
    proof, result = find(name), ProofResult.read(RESULTS / f"{name}.json")
    assert {(r.arm, r.seed) for r in result.runs} == {(arm, seed) for arm in proof.arms for seed in proof.seeds}
    assert len(proof.seeds) >= 3


@pytest.mark.parametrize("name", names())
def test_the_committed_result_belongs_to_the_proof_as_declared(name: str) -> None:
    proof, result = find(name), ProofResult.read(RESULTS / f"{name}.json")
    for field in ("name", "family", "sheet", "data", "metric", "baseline", "expected", "notes"):
        assert getattr(result, field) == getattr(proof, field), field
    assert result.training == dict(getattr(proof, "training", {}))


def test_no_result_is_without_a_proof() -> None:
    assert {path.stem for path in RESULTS.glob("*.json")} == set(names())


def test_the_evidence_of_the_catalogue_is_that_of_the_results_and_the_tests() -> None:
    """`python -m proofs index` writes it."""
    assert catalogue.evidence() == gather([ProofResult.read(RESULTS / f"{name}.json") for name in names()])


def test_every_method_is_tested() -> None:
    assert [name for name, found in catalogue.evidence().items() if not found["tests"]] == []

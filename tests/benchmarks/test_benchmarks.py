"""The benchmark runner, and that what it compares is the same training."""

from __future__ import annotations

import gc
import json
import sys
from copy import deepcopy
from pathlib import Path

import jsonschema
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import __main__ as command
from benchmarks import common, startup, step

SPREAD = {
    "type": "object",
    "required": ["median", "min", "max"],
    "additionalProperties": {"type": "number", "minimum": 0},
}
SCHEMA = {
    "type": "object",
    "required": ["name", "machine", "ratios", "limits"],
    "properties": {
        "name": {"enum": list(command.BENCHMARKS)},
        "machine": {"type": "object", "required": ["cpu", "cores", "platform"]},
        "versions": {"type": "object", "required": ["python", "torch", "transfuse"]},
        "ratios": {"type": "object", "minProperties": 1, "additionalProperties": SPREAD},
        "limits": {"type": "object", "additionalProperties": {"type": "number"}},
        "seconds": {
            "type": "object",
            "additionalProperties": {"type": "object", "required": ["ours", "theirs"]},
        },
    },
}


@pytest.fixture
def fake(monkeypatch):
    """A benchmark whose only comparison has the ratios 1.0, 1.2 and 2.0 against a limit."""

    def install(limit):
        result = common.Result("step")
        result.add("a / b", limit, [(1.0, 1.0), (2.4, 2.0), (6.0, 3.0)])
        monkeypatch.setattr(step, "measure", lambda repeats, smoke: result)

    return install


def test_measurements_alternate_and_warm_up():
    calls = []

    def side(name):
        def measure():
            calls.append(name)
            return float(len(calls))

        return measure

    assert common.alternate(side("ours"), side("theirs"), repeats=2, warmup=1) == [(3.0, 4.0), (5.0, 6.0)]
    assert calls == ["ours", "theirs"] * 3


def test_garbage_is_not_collected_while_measuring():
    with common.no_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_ratio_is_taken_in_each_pair_before_the_median():
    result = common.Result("step")
    result.add("a / b", 1.0, [(1.0, 1.0), (9.0, 10.0), (1.0, 0.1)])
    assert result.as_json()["ratios"]["a / b"] == pytest.approx({"median": 1.0, "min": 0.9, "max": 10.0, "pairs": 3})
    assert result.seconds["a / b"] == {"ours": 1.0, "theirs": 1.0}


def test_a_median_at_its_limit_passes(fake, capsys):
    fake(limit=1.2)
    assert command.main(["step"]) == 0
    assert "OVER" not in capsys.readouterr().out


def test_a_median_over_its_limit_fails(fake, capsys):
    fake(limit=1.19)
    assert command.main(["step"]) == 1
    assert "OVER" in capsys.readouterr().out


def test_smoke_never_fails_on_a_limit(fake):
    fake(limit=0.5)
    assert command.main(["step", "--smoke"]) == 0


def test_the_file_is_written_also_when_a_limit_is_broken(fake, tmp_path):
    fake(limit=0.5)
    assert command.main(["step", "--json", str(tmp_path / "step.json")]) == 1
    jsonschema.validate(json.loads((tmp_path / "step.json").read_text()), SCHEMA)


def test_list_names_every_benchmark(capsys):
    assert command.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(command.BENCHMARKS)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["step", "--repeats", "0"]])
def test_unusable_arguments_are_refused(arguments):
    with pytest.raises(SystemExit) as error:
        command.main(arguments)
    assert error.value.code == 2


def test_step_runs_and_fits_its_schema(tmp_path):
    assert command.main(["step", "--smoke", "--json", str(tmp_path / "step.json")]) == 0
    found = json.loads((tmp_path / "step.json").read_text())
    jsonschema.validate(found, SCHEMA)
    assert set(found["ratios"]) == set(found["limits"]) == set(step.CASES)


@pytest.mark.parametrize("name", ["small CNN, tensors", "language model, tensors"])
def test_the_loop_does_the_arithmetic_of_the_trainer(name, monkeypatch):
    case, steps = step.CASES[name](), 5
    # Both see the data in order.
    monkeypatch.setattr(torch, "randperm", lambda n, generator=None: torch.arange(n))
    trainer = step.trainer_of(case, steps)
    ours, theirs = trainer.fit(), deepcopy(case.student)
    for _ in step.hand_written(case, theirs, steps):
        pass
    for a, b, before in zip(ours.parameters(), theirs.parameters(), case.student.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert (a - before).abs().max() > 1e-4


def test_seconds_are_those_of_the_process():
    assert startup.seconds([sys.executable, "-c", "import time; time.sleep(0.3)"]) > 0.3


@pytest.mark.parametrize("line", ["import torch", "import json"])
def test_a_command_that_loads_torch_is_found_out(line, tmp_path, monkeypatch):
    script = tmp_path / "transfuse"
    script.write_text(f"{line}\nraise SystemExit(0)\n")
    monkeypatch.setattr(startup, "script", lambda: script)
    assert startup.imports_torch(["--help"]) is (line == "import torch")

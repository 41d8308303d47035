"""What every method that trains must do, generated from the catalogue: each runs on the example beside its tests."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Example, digest
from processes import on_ranks
from torch import nn

from transfuse.core import catalogue
from transfuse.core.errors import MethodError
from transfuse.core.method import Method
from transfuse.core.trainer import Trainer
from transfuse.experiment import Transfer

HERE = Path(__file__).parent
TRAINED = [e.name for e in catalogue.entries() if issubclass(e.load(), Method)]


@cache
def examples() -> dict[str, Callable[[], Example]]:
    """The examples of all families."""
    found: dict[str, Callable[[], Example]] = {}
    for path in sorted(HERE.glob("*/examples_*.py")):
        name = f"{path.parent.name}.{path.stem}"
        if name not in sys.modules:
            sys.path[:0] = [str(path.parent)]  # examples may share a module with the tests beside them
            spec = importlib.util.spec_from_file_location(name, path)
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
            sys.path.remove(str(path.parent))
        found |= sys.modules[name].EXAMPLES
    return found


def transfer_of(name: str, **options: Any) -> Transfer:
    torch.manual_seed(0)  # an example may draw its networks
    example = examples()[name]()
    settings = {"test": example.test, "checkpoint_every": 0.0, **example.options, **options}
    return Transfer(example.method, example.source, example.target, example.data, **settings)


def trainer_of(name: str, folder: Path | None = None, listener: Any = None) -> Trainer:
    transfer = transfer_of(name)
    trainer = transfer.trainer(transfer.arms[0], 0, transfer.build_target(0), folder)
    trainer.listener = listener
    return trainer


def outcome(trainer: Trainer, model: nn.Module) -> tuple[str, str, str, list[Any], int]:
    """Everything that a run ends with."""
    return digest(model), digest(trainer.run["target"]), digest(trainer.method), trainer.stages, trainer.updates


class Killed(BaseException):
    pass


def killed_at(update: int) -> Callable[..., None]:
    def listener(trainer: Trainer, record: Any) -> None:
        if trainer.updates == update:
            raise Killed

    return listener


def test_every_method_has_an_example():
    assert set(examples()) == set(TRAINED)


@pytest.mark.parametrize("name", TRAINED)
def test_a_method_keeps_its_arguments_and_can_be_written_in_a_recipe(name):
    method = examples()[name]().method
    assert type(method).__name__ in repr(method)
    rebuilt = eval(repr(method), {e.name: e.load() for e in catalogue.entries()})
    assert repr(rebuilt) == repr(method)


@pytest.mark.parametrize("name", TRAINED)
def test_killed_at_four_points_and_resumed_it_ends_bit_identical(name, tmp_path):
    whole = trainer_of(name)
    expected = outcome(whole, whole.fit())
    last = whole.updates
    if not last:  # it trains nothing, and has no update to be killed after
        assert trainer_of(name, tmp_path).fit(resume=True) is not None
        return
    for update in sorted({1, max(1, last // 3), max(1, last // 2), max(1, last - 1)}):
        folder = tmp_path / str(update)
        with pytest.raises(Killed):
            trainer_of(name, folder, killed_at(update)).fit()
        torch.manual_seed(12345)
        again = trainer_of(name, folder)
        assert outcome(again, again.fit(resume=True)) == expected, f"killed after update {update} of {last}"


@pytest.mark.parametrize("name", TRAINED)
def test_deploying_changes_nothing_and_can_be_repeated(name):
    trainer = trainer_of(name)
    model = trainer.fit()
    before = digest(trainer.run["target"]), digest(trainer.method)
    assert digest(trainer.method.deploy(trainer.run["target"])) == digest(model)
    assert (digest(trainer.run["target"]), digest(trainer.method)) == before


@pytest.mark.parametrize("name", TRAINED)
def test_what_the_user_passed_in_stays_as_it_is(name):
    transfer = transfer_of(name)
    given = {"target": transfer.target, **transfer.sources}
    before = {role: digest(model) for role, model in given.items()}
    modes = {role: [m.training for m in model.modules()] for role, model in given.items()}
    transfer.run()
    assert {role: digest(model) for role, model in given.items()} == before
    assert {role: [m.training for m in model.modules()] for role, model in given.items()} == modes


@pytest.mark.parametrize("name", TRAINED)
def test_a_finished_run_is_read_again_and_not_trained_again(name, tmp_path):
    first = transfer_of(name, out=tmp_path / "run").run()
    again = transfer_of(name, out=tmp_path / "run", listener=lambda *_: pytest.fail("it trained again")).run(
        resume=True
    )
    assert digest(again.model) == digest(first.model)
    assert again.report.arms == first.report.arms


def on_rank(folder: Path, rank: int) -> None:
    name = folder.name
    torch.manual_seed(100 + rank)  # what differs between processes must not matter
    trainer = trainer_of(name)
    model = trainer.fit()
    found = digest(model), digest(trainer.method), trainer.updates
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(found))


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_end_with_the_same_model_or_the_method_says_why_not(name, tmp_path):
    method = copy.deepcopy(examples()[name]().method)
    if method.one_process:
        trainer = trainer_of(name)
        trainer.sync.world = 2
        with pytest.raises(MethodError, match="cannot run on 2 processes"):
            Trainer(method, trainer.run.roles, trainer.run.data, trainer.training, sync=trainer.sync)
        return
    folder = tmp_path / name
    folder.mkdir()
    one, other = on_ranks(on_rank, folder)
    assert one == other

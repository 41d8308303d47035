"""Killed and resumed, data-free runs end bit-identical, with one process and with two, which agree."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CNN, digest, trainer
from processes import on_ranks
from synthesize.examples_synthesize import OPTIONS, SMALL, teacher

from transfuse.core.sync import sync_for
from transfuse.core.trainer import Trainer
from transfuse.synthesize import CAEDFKD, DataFree, RetainAcquire

CASES: dict[str, Callable[[], DataFree]] = {
    "contrast": lambda: CAEDFKD(**SMALL, life=2, slots=2, learn_magnitude=True),
    "buffer": lambda: RetainAcquire(**SMALL, slots=2, every=1),
    "generative": lambda: RetainAcquire(**SMALL, memory="generative", lr=0.01),
}


SHARED = ("contrast", "buffer")
"""The cases that two processes run: one of each method."""


class Killed(BaseException):
    pass


def run(case: str, folder: Path | None = None, kill: int = 0, **settings: Any) -> Trainer:
    def listener(run: Trainer, record: Any) -> None:
        if run.updates == kill:
            raise Killed

    student = CNN(norm=True, dropout=0.3, seed=2)
    return trainer(CASES[case](), student, teacher(), {}, folder=folder, listener=listener, **OPTIONS | settings)


def outcome(run: Trainer) -> dict[str, Any]:
    return {"student": digest(run.fit(resume=True)), "method": digest(run.method), "history": run.history}


@pytest.mark.parametrize("update", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_it_ends_bit_identical(case, update, tmp_path):
    expected = outcome(run(case))
    with pytest.raises(Killed):
        run(case, tmp_path, kill=update).fit()
    torch.manual_seed(99)
    assert outcome(run(case, tmp_path)) == expected


def work(folder: Path, rank: int) -> None:
    sync, found = sync_for("cpu"), {}
    for case in SHARED:
        whole = run(case, sync=sync)
        found[case, "whole"] = outcome(whole)
        found[case, "bad"] = whole.method.collapse.bad.tolist()
        try:
            run(case, folder / case, kill=3, sync=sync).fit()
        except Killed:
            torch.manual_seed(99 + rank)
        found[case, "resumed"] = outcome(run(case, folder / case, sync=sync))
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", SHARED)
def test_two_processes_have_one_generator_pool_memory_and_student(case, ranks):
    for what in ("student", "method"):
        assert ranks[0][case, "whole"][what] == ranks[1][case, "whole"][what]
    assert ranks[0][case, "bad"] == ranks[1][case, "bad"]


@pytest.mark.parametrize("case", SHARED)
def test_two_processes_resume_bit_identical(case, ranks):
    for rank in ranks:
        for what in ("student", "method"):
            assert rank[case, "resumed"][what] == rank[case, "whole"][what]

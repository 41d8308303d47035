"""Phases that share an optimiser: the same parameters, taught now by one loss, now by another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import CNN, digest, images, trainer

from transfuse.core.errors import MethodError
from transfuse.core.phases import Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Generated
from transfuse.distill import Labels


class InTurns(Labels):
    """Every second update is one phase's, the others the other's."""

    def __init__(self, shared: bool = True):
        super().__init__()
        self.shared = shared

    def stage(self, i: int, run: Run) -> Stage:
        params = list(run["target"].parameters())
        name = "both" if self.shared else None

        def of(turn: int) -> Any:
            return lambda batches, run: self.losses(batches, run) if run.clock.step % 2 == turn else {}

        phases = [Phase("even", of(0), params, optimizer=name), Phase("odd", of(1), params, optimizer=name)]
        return Stage({"data": run.data["data"]}, phases)


def momenta(method: Labels) -> tuple[CNN, Any]:
    target = CNN()
    run = trainer(method, target, None, images(24), steps=12, optimizer="adam", lr=0.01)
    run.fit()
    return target, run


def test_two_phases_in_turns_are_one_phase_when_they_share_the_optimiser():
    one, _ = momenta(Labels())
    shared, run = momenta(InTurns())
    apart, _ = momenta(InTurns(shared=False))
    assert digest(shared) == digest(one)
    assert digest(apart) != digest(one)  # momenta of every second update only
    assert list(run.run.optimizers) == ["both"]


def test_parameters_that_one_of_the_phases_teaches_are_not_called_untaught():
    _, run = momenta(InTurns())
    assert not run.watch.messages
    _, run = momenta(InTurns(shared=False))
    assert not run.watch.messages


def test_phases_that_share_an_optimiser_need_the_same_parameters():
    one, other = CNN(), CNN(seed=1)
    phases = [Phase(n, lambda *_: {}, m.parameters(), optimizer="both") for n, m in (("a", one), ("b", other))]
    with pytest.raises(MethodError, match="'a' and 'b' share the optimiser 'both' but not their parameters"):
        Stage({"noise": Generated(1)}, phases)
    again = Phase("c", lambda *_: {}, list(one.parameters())[::-1], optimizer="both")
    assert torch.equal(Stage({"noise": Generated(1)}, [phases[0], again]).trained[1].params[0], again.params[0])

"""Taps whose names a method learns from the model, and models of its own that it runs as roles."""

from __future__ import annotations

import pytest
import torch
from helpers import CNN, batch

from transfuse.core.errors import InputError
from transfuse.core.run import Run


def test_taps_can_be_declared_after_a_role_has_run():
    run = Run({"target": CNN()}, {})
    run.install({"target": ["layer1"]})
    assert list(run("target", batch(), grad=False).features) == ["layer1"]
    run.tap("target", ["layer2", "layer1"])
    assert list(run("target", batch(), grad=False).features) == ["layer1", "layer2"]
    run.remove_taps()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run["target"].modules())


def test_taps_of_a_role_that_is_not_there_are_refused():
    with pytest.raises(InputError, match="this run has no 'tarrget': did you mean 'target'"):
        Run({"target": CNN()}, {}).tap("tarrget", ["layer1"])


def test_a_model_of_the_methods_own_is_run_like_any_other():
    run = Run({"target": CNN()}, {})
    own = CNN(seed=5)
    run.add("copy", own)
    run.tap("copy", ["layer2"])
    found = run("copy", batch(), grad=False)
    assert torch.equal(found.logits, own(batch().inputs)) and "layer2" in found.features
    with run.probe():
        run.set_modes(set())
        assert not own.training
    assert own.training

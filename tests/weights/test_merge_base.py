import copy

import pytest
import torch
from helpers import CNN, images

from transfuse import transfer
from transfuse.core.errors import InputError
from transfuse.weights import SLERP, Linear, TaskArithmetic, merge
from transfuse.weights.base import settled
from transfuse.weights.checkpoint import InMemory
from transfuse.weights.engine import depths_of


def test_settings_are_settled_for_one_tensor():
    by_name = {"*.mlp.*": {"depth": [0.0, 1.0]}, "*": [0.25, {"depth": [1, 0, 1]}]}
    assert settled(by_name, "layers.1.mlp.up", 0.25) == 0.25
    assert settled(by_name, "layers.1.attn", 0.25) == [0.25, 0.5]
    assert settled(0.3, "anything", 1.0) == 0.3
    with pytest.raises(InputError, match="no value for 'head'"):
        settled({"body.*": 1.0}, "head", 0.0)


def test_a_merge_is_made_for_one_tensor_and_checked_by_its_own_arguments():
    method = Linear([{"depth": [0.0, 1.0]}, {"depth": [1.0, 0.0]}])
    assert method.at("x", 0.25).weight == [0.25, 0.75]
    assert Linear(0.5).at("x", 0.25).weight == 0.5


def test_a_pattern_that_fits_no_tensor_is_refused():
    a = {f"layers.{i}.w": torch.randn(4, 4) for i in range(2)}
    b = {k: v + 0.1 for k, v in a.items()}
    with pytest.raises(InputError, match=r"the pattern 'layer.0.\*' fits no tensor; did you mean 'layers.0.w'"):
        merge(SLERP(t={"layers.1.*": 0.2, "*": {"layer.0.*": 0.1, "*": 0.5}}), [a, b])
    every = SLERP(t={"layers.0.*": 0.2, "layers.1.*": 0.2, "*": 0.5})  # the rest may be nothing
    assert set(merge(every, [a, b]).state) == set(a)
    assert SLERP(t={"x": 0.2, "*": 0.5}).without(["x"]).t == {"*": 0.5}


def test_depths_run_from_the_first_numbered_layer_to_the_last():
    state = {"embed": 0, "layers.0.w": 0, "layers.1.w": 0, "layers.2.w": 0, "norm": 0, "head": 0}
    depths = depths_of(InMemory({k: torch.zeros(1) for k in state}))
    assert list(depths.values()) == [0.0, 0.0, 0.5, 1.0, 0.0, 0.0]


def test_the_average_of_models_in_memory_by_hand():
    models, target = [CNN(seed=s) for s in (1, 2)], CNN()
    before = copy.deepcopy(target.state_dict())
    merged = transfer(Linear([3.0, 1.0]), models, target, test=images()).model
    for key, value in merged.state_dict().items():
        a, b = (m.state_dict()[key] for m in models)
        assert torch.allclose(value, 0.75 * a + 0.25 * b, atol=1e-7)
    assert all(torch.equal(before[k], v) for k, v in target.state_dict().items())
    assert type(merged) is CNN


def test_the_report_says_how_much_of_each_model_is_in_the_merge():
    target = CNN()
    models = [copy.deepcopy(target) for _ in range(3)]
    with torch.no_grad():
        for model, factor in zip(models, (1.0, 1.0, -2.0), strict=True):
            for name, p in model.named_parameters():
                draw = torch.Generator().manual_seed(len(name))
                p.add_(factor * torch.randn(p.shape, generator=draw))

    def shares(weight: list[float]) -> list[float]:
        report = transfer(TaskArithmetic(weight), models, target, test=images()).report
        (panel,) = [p for p in report.panels if p.title == "What of each model is in the merge"]
        return panel.values[0]

    assert shares([1.0, 0.0, 0.0]) == pytest.approx([1.0, 1.0, -0.5], abs=1e-4)
    assert shares([1.0, 1.0, 1.0]) == pytest.approx([0.0, 0.0, 0.0], abs=1e-4)  # they cancel
    assert shares([0.5, 1.0, 0.0]) == pytest.approx([1.5, 1.5, -0.75], abs=1e-4)

import copy

import pytest
import torch
from helpers import CNN, language_model
from torch import nn
from weights.composing import tuned

from transfuse.core.errors import InputError, ShapeError
from transfuse.weights.checkpoint import InMemory
from transfuse.weights.task_vectors import TaskVectors


def test_a_task_vector_is_the_difference_to_the_base_and_buffers_have_none():
    base = CNN(norm=True)
    models = {"a": tuned(base, 1), "b": InMemory(tuned(base, 2).state_dict(), "b")}
    vectors = TaskVectors(base, models)
    assert vectors.blocks == [name for name, _ in base.named_parameters()]
    for block, p in base.named_parameters():
        assert torch.equal(vectors.stack(block)[0], models["a"].get_parameter(block) - p)
        assert torch.equal(vectors.stack(block, [1])[0], models["b"].read(block) - p)
    norms = vectors.norms()
    assert norms.shape == (2, len(vectors.blocks))
    assert norms[0, 0] == pytest.approx(vectors.difference(0, "layer1.weight").norm().item())


def test_tied_parameters_are_one_block():
    base = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    base["b"].weight = base["a"].weight
    assert TaskVectors(base, {"m": copy.deepcopy(base)}).blocks == ["a.weight", "a.bias", "b.bias"]


def test_equal_models_are_found():
    base = CNN()
    one = tuned(CNN(norm=True), 1)
    models = {"a": one, "b": copy.deepcopy(one), "c": tuned(CNN(norm=True), 2)}
    assert TaskVectors(CNN(norm=True), models).duplicates() == [("a", "b")]
    assert TaskVectors(base, {"a": CNN(seed=1), "b": CNN(seed=2)}).duplicates() == []


def test_what_is_no_model_of_this_base_is_refused_by_name():
    base = CNN()
    with pytest.raises(InputError, match="pass them as source"):
        TaskVectors(base, {})
    with pytest.raises(ShapeError, match=r"wide: 'layer1.weight' is \(8, 1, 3, 3\), the base has \(4, 1, 3, 3\)"):
        TaskVectors(base, {"wide": CNN(width=8)})
    with pytest.raises(InputError, match="lm has no tensor 'layer1.weight'"):
        TaskVectors(base, {"lm": language_model()})
    broken = CNN()
    broken.fc.bias.data[0] = torch.nan
    with pytest.raises(InputError, match=r"broken: 'fc.bias' holds numbers that are not finite"):
        TaskVectors(base, {"broken": broken})
    assert "fc.bias" not in TaskVectors(base, {"broken": broken}, head="fc").blocks
    with pytest.raises(InputError, match="no layer 'head'"):
        TaskVectors(base, {"a": CNN()}, head="head")

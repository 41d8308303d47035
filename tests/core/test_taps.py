from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import CNN, batch, images, language_model, trainer
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.errors import LayerError
from transfuse.core.run import Run
from transfuse.core.taps import Taps, batch_norms, resolve, trace_penultimate
from transfuse.distill import RKD, Hints, Labels
from transfuse.models.vit import ViTTiny


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class Recurrent(nn.Module):
    """A layer that gives a tuple, called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 4, batch_first=True)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _last = self.rnn(input=x)
        return self.fc(hidden[:, -1])


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def read(model: nn.Module, names: list[str], inputs: Tensor, **options: Any) -> Any:
    taps = Taps(model, names, inputs)
    try:
        with taps.open(**options) as features:
            model(inputs)
        return features
    finally:
        taps.remove()


X = torch.randn(5, 1, 4, 4)


def test_reads_a_layer_and_its_input_under_the_names_asked_for():
    model = CNN()
    features = read(model, ["layer2", "layer2:input", "fc:input"], X)
    assert list(features) == ["layer2", "layer2:input", "fc:input"]
    assert torch.equal(features["layer2:input"], model.layer1(X).tanh())
    assert torch.equal(features["layer2"], model.layer2(model.layer1(X).tanh()))


def test_a_wildcard_gives_a_list_in_the_models_order():
    model = ViTTiny(image=4, patch=2, dim=8, depth=3, heads=2).eval()
    features = read(model, ["blocks.*", "blocks.*.mlp.fc1:input"], X)
    assert len(features["blocks.*"]) == len(features["blocks.*.mlp.fc1:input"]) == 3
    assert torch.equal(features["blocks.*"][2], read(model, ["blocks.2"], X)["blocks.2"])


@pytest.mark.parametrize("name", ["layer2", "layer*", "penultimate", "fc:input"])
def test_a_wrapped_model_keeps_its_names(name):
    model = CNN()
    plain, wrapped = read(model, [name], X)[name], read(Wrapped(Wrapped(model)), [name], X)[name]
    for one, other in zip(plain, wrapped, strict=True):
        assert torch.equal(one, other)


def test_penultimate_is_the_input_of_the_linear_layer_that_gives_the_logits():
    assert trace_penultimate(CNN(), X) == "fc:input"
    assert trace_penultimate(ViTTiny(image=4, patch=2, dim=8, depth=1, heads=2), X) == "head:input"
    tokens = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    assert trace_penultimate(language_model(), tokens) == "head:input"


def test_tracing_leaves_modes_and_statistics_alone():
    model = CNN(norm=True).train()
    model.drop.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trace_penultimate(model, X)
    assert model.training
    assert model.norm.training
    assert not model.drop.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert hooks(model) == 0


def test_a_model_without_a_linear_head_has_no_penultimate():
    with pytest.raises(LayerError, match="no linear layer that gives its 4 logits"):
        trace_penultimate(nn.Sequential(nn.Linear(4, 3), nn.Conv2d(1, 4, (4, 3)), nn.Flatten()), X)


# Names that do not fit


def test_a_missing_layer_is_answered_with_the_nearest():
    with pytest.raises(LayerError, match="CNN has no layer 'layer3': did you mean 'layer2' or 'layer1'"):
        resolve(CNN(), "layer3")
    with pytest.raises(LayerError, match=r"no layer 'block\.\*'"):
        resolve(CNN(), "block.*")


@pytest.mark.parametrize("name", ["0", "*.0.weights"])
def test_what_fits_several_or_none_is_refused(name):
    with pytest.raises(LayerError):
        resolve(nn.ModuleDict({"a": TwoTowers(), "b": TwoTowers()}), name)


def test_an_ambiguous_suffix_is_refused_with_what_it_fits():
    with pytest.raises(LayerError, match=r"'0' is ambiguous in TwoTowers: left\.0, right\.0; give a longer path"):
        resolve(TwoTowers(), "0")


def test_a_wildcard_never_mixes_two_places():
    model = nn.ModuleDict(
        {
            "encoder": nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1)])}),
            "decoder": nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1)])}),
        }
    )
    with pytest.raises(LayerError, match=r"'blocks\.\*' is ambiguous"):
        resolve(model, "blocks.*")
    assert resolve(model, "decoder.blocks.*") == ["decoder.blocks.0"]


def test_an_exact_path_wins_over_suffixes():
    model = nn.ModuleDict({"fc": nn.Linear(1, 1), "head": nn.ModuleDict({"fc": nn.Linear(1, 1)})})
    assert resolve(model, "fc") == ["fc"]


def test_only_input_may_follow_a_colon():
    with pytest.raises(LayerError, match="only ':input' is possible"):
        resolve(CNN(), "layer1:output")


def test_a_layer_that_does_not_run_says_so_when_it_is_asked_for():
    features = read(TwoTowers(), ["left.0", "unused"], torch.randn(3, 2))
    assert features["left.0"].shape == (3, 2)
    with pytest.raises(LayerError, match="'unused' was not run in this forward pass"):
        features["unused"]


# Replacing and stopping


def test_swap_replaces_an_activation_by_a_tensor_or_a_function():
    model = CNN()
    zeros = torch.zeros(5, 8, 2, 2)
    taps = Taps(model, ["layer2", "fc:input"])
    with taps.open(swap={"layer2": zeros}) as features:
        replaced = model(X)
    assert torch.equal(features["layer2"], zeros)
    assert torch.equal(replaced, model.fc(torch.zeros(5, 8)))
    with taps.open(swap={"fc:input": lambda h: 2 * h}) as features:
        doubled = model(X)
    assert torch.allclose(doubled, model.fc(features["fc:input"]))
    with taps.open():
        assert not torch.allclose(doubled, model(X))
    taps.remove()


def test_until_stops_the_pass_and_gives_what_was_read():
    model = CNN()
    run = Run({"target": model}, {})
    run.install({"target": ["layer1", "layer2:input", "fc"]})
    later = []
    model.fc.register_forward_hook(lambda *a: later.append(1))
    outputs = run("target", Batch(inputs=X), until="layer2:input")
    assert outputs.raw is None
    assert list(outputs.features) == ["layer1", "layer2:input"]
    assert not later
    assert run("target", Batch(inputs=X)).logits.shape == (5, 3)
    run.remove_taps()


def test_swap_and_until_need_a_tap_that_was_asked_for():
    taps = Taps(CNN(), ["layer1"])
    with pytest.raises(LayerError, match=r"'layer2' is not among the taps this method asked for in wants\(\): layer1"):
        taps.open(until="layer2").__enter__()
    taps = Taps(CNN(), ["layer*"])
    with pytest.raises(LayerError, match="stands for 2 layers, one is needed here"):
        taps.open(swap={"layer*": X}).__enter__()


def test_reads_and_swaps_the_first_of_a_tuple_and_keyword_arguments():
    model, steps = Recurrent(), torch.randn(3, 6, 2)
    features = read(model, ["rnn", "rnn:input"], steps)
    assert features["rnn"].shape == (3, 6, 4)
    assert torch.equal(features["rnn:input"], steps)
    taps = Taps(model, ["rnn", "rnn:input"])
    with taps.open(swap={"rnn": torch.zeros(3, 6, 4)}):
        assert torch.equal(model(steps), model.fc(torch.zeros(3, 4)))
    with taps.open(swap={"rnn:input": torch.zeros_like}) as features:
        model(steps)
    assert torch.equal(features["rnn"], model.rnn(torch.zeros_like(steps))[0])


def test_a_layer_without_a_tensor_says_so():
    class Dicts(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x}

    model = nn.Sequential(Dicts())
    taps = Taps(model, ["0"])
    with pytest.raises(LayerError, match="'0' gives a dict, not a tensor"), taps.open():
        model(X)


# Leaving no trace


def test_closed_taps_read_nothing_and_removed_ones_are_gone():
    model = CNN()
    taps = Taps(model, ["layer1", "layer2:input"])
    assert hooks(model) == 2
    with taps.open() as features:
        pass
    model(X)
    assert dict(features) == {}
    taps.remove()
    assert hooks(model) == 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_no_hook_on_any_model(fails):
    def stop(*_: Any) -> None:
        if fails:
            raise RuntimeError("stop")

    student, teacher = CNN(), CNN(width=6)
    run = trainer(Labels() + Hints("layer2", "layer2") + RKD(), student, teacher, images(), listener=stop)
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            run.fit()
    else:
        run.fit()
    assert hooks(student) == hooks(teacher) == 0


def test_a_clone_of_a_role_has_no_hooks_and_the_role_keeps_its_taps():
    model = CNN()
    run = Run({"target": model}, {})
    run.install({"target": ["layer1"]})
    run("target", batch())
    assert hooks(run.clone("target")) == 0
    assert "layer1" in run("target", batch()).features
    run.remove_taps()
    assert hooks(model) == 0


@pytest.mark.parametrize("tap", ["layer2", "penultimate"])
def test_a_compiled_model_is_tapped_before_its_first_call(tap):
    model = CNN()
    compiled = torch.compile(model, backend="aot_eager")
    run = Run({"target": compiled}, {})
    run.install({"target": [tap]})
    run.set_modes(set())
    outputs = run("target", batch())
    expected = read(model.eval(), [tap], batch().inputs)[tap]
    assert torch.allclose(outputs.features[tap], expected)
    run.remove_taps()


def test_a_compiled_pair_trains():
    student, teacher = CNN(seed=1), CNN(width=6)
    plain = trainer(Hints("layer2", "layer2") + RKD(), CNN(seed=1), CNN(width=6), images()).fit()
    compiled = torch.compile(student, backend="aot_eager")
    trainer(Hints("layer2", "layer2") + RKD(), compiled, torch.compile(teacher, backend="aot_eager"), images()).fit()
    for one, other in zip(plain.parameters(), student.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


# Batch normalisation


def test_the_role_batchnorm_reads_what_every_such_layer_is_given():
    model = nn.Sequential(
        nn.BatchNorm2d(1),
        nn.Conv2d(1, 3, 3),
        nn.Sequential(nn.BatchNorm2d(3)),
        nn.BatchNorm2d(3, track_running_stats=False),
    ).eval()
    images = torch.randn(2, 1, 4, 4)
    assert list(batch_norms(model)) == ["0", "2.0"]  # the last keeps no statistics
    given = read(model, ["batchnorm"], images)["batchnorm"]
    assert len(given) == 2 and torch.equal(given[0], images) and torch.equal(given[1], model[1](model[0](images)))


def test_the_role_batchnorm_of_a_model_without_such_layers_is_refused():
    with pytest.raises(LayerError, match="no layer 'batchnorm'"):
        read(CNN(), ["batchnorm"], torch.randn(2, 1, 4, 4))

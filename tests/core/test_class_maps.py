from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.class_maps import ClassMapHead, class_maps, find_class_map_head
from transfuse.core.errors import LayerError
from transfuse.core.run import Run
from transfuse.core.taps import Taps
from transfuse.models import SmallCNN, resnet8

X = torch.randn(5, 1, 12, 12, generator=torch.Generator().manual_seed(0))


class Pooled(nn.Module):
    """A head with everything that may stand between the last map and the linear layer."""

    def __init__(self, activation: nn.Module | None = None):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.act = activation or nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return {"logits": self.fc(self.drop(self.pool(self.act(self.conv(x))).flatten(1)))}


def read(model: nn.Module, names: list[str], inputs: Tensor = X, **options: Any) -> Any:
    taps = Taps(model, names, inputs)
    try:
        with taps.open(**options) as features:
            model(inputs)
        return features
    finally:
        taps.remove()


@pytest.mark.parametrize("build", [lambda: SmallCNN(width=4), lambda: resnet8(channels=1, width=4), Pooled])
def test_the_average_of_the_maps_and_the_bias_are_the_logits(build):
    model = build().eval()
    maps, logits = read(model, ["class_maps"])["class_maps"], model(X)
    logits = logits["logits"] if isinstance(logits, dict) else logits
    assert maps.dim() == 4 and maps.shape[:2] == logits.shape and maps[0, 0].numel() > 1
    assert (maps.mean((2, 3)) + model.fc.bias - logits).abs().max() < 1e-5
    # Without the bias, the difference is the bias.
    assert torch.allclose((logits - maps.mean((2, 3))), model.fc.bias.expand_as(logits), atol=1e-6)


def test_a_map_is_the_linear_layer_at_every_position():
    features, weight = torch.randn(2, 3, 4, 5), torch.randn(6, 3)
    assert torch.allclose(class_maps(features, weight), torch.einsum("kd,bdyx->bkyx", weight, features), atol=1e-6)


def test_the_head_is_found_whatever_stands_between():
    assert find_class_map_head(SmallCNN(), X) == ClassMapHead("layer3", "fc")
    assert find_class_map_head(resnet8(channels=1), X) == ClassMapHead("layer3", "fc")
    # The activation writes in place, and the pooled 1x1 map has the same average: neither is mistaken for the map.
    assert find_class_map_head(Pooled(), X) == ClassMapHead("act", "fc")


def test_finding_the_head_leaves_no_trace():
    model = SmallCNN().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    find_class_map_head(model, X)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_gradients_reach_the_map_and_the_weight_but_not_the_bias():
    model = SmallCNN(width=4)
    read(model, ["class_maps"])["class_maps"].square().sum().backward()
    assert model.layer3.conv.weight.grad.abs().max() > 0
    assert model.fc.weight.grad.abs().max() > 0
    assert model.fc.bias.grad is None


def test_a_run_with_other_parameters_reads_their_maps():
    model = SmallCNN(width=4)
    run = Run({"target": model}, {})
    run.install({"target": ["class_maps"]})
    run.set_modes(set())
    one = Batch(inputs=X)
    maps = run("target", one).features["class_maps"]
    doubled = run("target", one, params={"fc.weight": 2 * model.fc.weight}).features["class_maps"]
    assert torch.allclose(doubled, 2 * maps)
    run.remove_taps()


def test_class_maps_stand_beside_other_taps_and_replaced_features():
    model = SmallCNN(width=4).eval()
    features = read(model, ["layer3", "class_maps", "penultimate"])
    assert torch.equal(features["class_maps"], class_maps(features["layer3"], model.fc.weight))
    visits: list[int] = []
    swapped = read(model, ["layer3", "class_maps"], swap={"layer3": lambda t: visits.append(1) or 0 * t})
    assert swapped["class_maps"].abs().max() == 0
    assert visits == [1]


@pytest.mark.parametrize("options", [{"swap": {"class_maps": X}}, {"until": "class_maps"}])
def test_class_maps_can_only_be_read(options):
    with pytest.raises(LayerError, match="they can be read, but not replaced"):
        read(SmallCNN(width=4), ["class_maps"], **options)


class FlatHead(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(200, 3))


class DeepHead(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
        )


class Functional(Pooled):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).tanh().mean((2, 3)))


@pytest.mark.parametrize("build", [FlatHead, DeepHead, Functional])
def test_a_head_that_is_not_an_average_and_one_linear_layer_is_refused(build):
    with pytest.raises(LayerError, match="is not the average over positions of any module's output"):
        find_class_map_head(build(), X)


def test_a_model_whose_logits_are_no_linear_layers_output_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(LayerError, match="its logits are not the output of a linear layer"):
        find_class_map_head(model, X)

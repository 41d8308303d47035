from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError, ShapeError
from transfuse.models import (
    MLP,
    MODELS,
    DecoderLM,
    ResNet,
    SmallCNN,
    SphereClassifier,
    ViTTiny,
    build,
    resnet8,
    resnet20,
)

torch.manual_seed(0)
SMALL = [name for name in MODELS if not name.startswith("smollm2")]  # its weights are a package's
INPUTS = {
    "mlp": torch.rand(6, 1, 8, 8),
    "small-cnn": torch.rand(6, 1, 28, 28),
    "resnet8": torch.rand(6, 3, 32, 32),
    "resnet20": torch.rand(6, 3, 32, 32),
    "vit-tiny": torch.rand(6, 1, 28, 28),
    "decoder-lm": torch.randint(256, (6, 128)),
    "sphere-classifier": torch.rand(6, 64),
}


STEPS = {"sphere-classifier": 100}
"""Of Adam until six samples are fitted, where 30 are too few: features of length 1 make small logits."""


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_gradient_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = build(name)
    logits: Tensor = model(INPUTS[name])
    logits.flatten(0, -2).log_softmax(-1)[:, 0].sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


@pytest.mark.parametrize("name", SMALL)
def test_a_network_can_fit_six_samples(name: str) -> None:
    torch.manual_seed(0)
    model = build(name)
    inputs = INPUTS[name]
    labels = torch.arange(6) if name != "decoder-lm" else inputs[:, 1]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS.get(name, 30)):
        logits = model(inputs) if name != "decoder-lm" else model(inputs[:, :1])[:, -1]
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


@pytest.mark.parametrize("name", [n for n in SMALL if n != "decoder-lm"])
def test_samples_do_not_influence_each_other_in_eval_mode(name: str) -> None:
    model = build(name).eval()
    inputs = INPUTS[name]
    torch.testing.assert_close(model(inputs)[:2], model(inputs[:2]), atol=1e-5, rtol=1e-5)


def test_mlp_flattens_any_input() -> None:
    model = MLP(inputs=12, classes=5)
    assert model(torch.rand(2, 3, 2, 2)).shape == (2, 5)
    assert model(torch.rand(2, 12)).shape == (2, 5)


def test_mlp_layers_have_the_documented_names() -> None:
    names = [n for n, _ in MLP(hidden=(32, 16)).named_children()]
    assert names == ["flatten", "linear1", "relu1", "linear2", "relu2", "fc"]


def test_mlp_without_hidden_layers_is_linear() -> None:
    model = MLP(inputs=3, hidden=(), classes=2)
    x = torch.rand(4, 3)
    torch.testing.assert_close(model(x), x @ model.fc.weight.T + model.fc.bias)


@pytest.mark.parametrize("size", [4, 8, 28, 32])
def test_small_cnn_takes_images_of_any_size(size: int) -> None:
    assert SmallCNN(channels=3, classes=7)(torch.rand(2, 3, size, size)).shape == (2, 7)


def test_small_cnn_halves_the_image_and_doubles_the_channels() -> None:
    model = SmallCNN(width=8)
    shapes = {}
    for name in ("layer1", "layer2", "layer3"):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: shapes.update({name: tuple(output.shape)})
        )
    model(torch.rand(2, 1, 28, 28))
    assert shapes == {"layer1": (2, 8, 28, 28), "layer2": (2, 16, 14, 14), "layer3": (2, 32, 7, 7)}


def test_parameter_counts() -> None:
    assert count(MLP()) == 64 * 64 + 64 + 64 * 10 + 10
    assert count(SmallCNN()) == 24_058
    assert count(ViTTiny()) == 205_066
    assert count(DecoderLM()) == 124_672


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_resnet_is_as_large_as_table_6_of_the_paper_says(depth: int, millions: float) -> None:
    assert round(count(ResNet(depth)) / 1e6, 2) == millions


def test_resnet_parameter_counts_match_the_docstrings() -> None:
    assert count(resnet8()) == 75_290
    assert count(resnet20()) == 269_722


def test_sphere_features_have_length_one_whatever_the_scale_of_the_inputs() -> None:
    model, x = SphereClassifier(inputs=12, width=32), torch.rand(3, 3, 2, 2)
    seen = []
    model.fc.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    torch.testing.assert_close(model(x), model(50 * x))
    torch.testing.assert_close(seen[0].norm(dim=1), torch.ones(3))


def test_sphere_parameters_start_from_a_normal_distribution_cut_at_two_deviations() -> None:
    torch.manual_seed(0)
    for p in SphereClassifier().parameters():
        assert p.abs().max() <= 0.02
    assert SphereClassifier().project.weight.std().item() == pytest.approx(0.0088, rel=0.03)  # of a normal cut at 2


def test_resnet_has_as_many_weighted_layers_as_its_depth() -> None:
    layers = [m for m in resnet20().modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 20


def test_resnet_has_the_names_of_the_field() -> None:
    names = [n for n, _ in resnet8().named_children()]
    assert names == ["conv1", "bn1", "layer1", "layer2", "layer3", "fc"]


def test_residual_block_whose_branch_is_silent_is_its_shortcut() -> None:
    block = resnet8().layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 8, 8)
    expected = torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 16, 4, 4)], dim=1)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_resnet_refuses_a_depth_that_does_not_exist(depth: int) -> None:
    with pytest.raises(InputError, match=f"6n \\+ 2.*found {depth}"):
        ResNet(depth)


def test_vit_has_one_token_per_patch_and_one_for_the_class() -> None:
    model = ViTTiny(image=32, patch=8, channels=3, classes=4)
    tokens = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: tokens.append(output.shape[1]))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 4)
    assert tokens == [17]


def test_vit_knows_where_a_patch_was() -> None:
    torch.manual_seed(0)
    model = ViTTiny()
    images = torch.rand(1, 1, 28, 28)
    same_patches_elsewhere = images.roll(7, dims=-1)
    assert (model(images) - model(same_patches_elsewhere)).abs().max() > 1e-4


def test_vit_refuses_patches_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="image=28 and patch=5"):
        ViTTiny(patch=5)


def test_vit_refuses_images_of_another_size() -> None:
    with pytest.raises(ShapeError, match=r"28x28 pixels, found a batch of shape \(2, 1, 32, 32\)"):
        ViTTiny()(torch.rand(2, 1, 32, 32))


@pytest.mark.parametrize("model", [ViTTiny, DecoderLM])
def test_heads_must_divide_the_width(model: type[nn.Module]) -> None:
    with pytest.raises(InputError, match="dim=64 and heads=5"):
        model(heads=5)


def test_build_passes_the_arguments_on() -> None:
    model = build("resnet8", channels=1, classes=3)
    assert isinstance(model, ResNet)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)


def test_build_names_the_nearest_model() -> None:
    with pytest.raises(InputError, match="there is no model 'resnet-20'; did you mean 'resnet20'"):
        build("resnet-20")


def test_build_names_the_accepted_arguments() -> None:
    with pytest.raises(InputError, match="'mlp' has no argument 'depth'; it takes: inputs=64, hidden=") as error:
        build("mlp", depth=3)
    assert "classes=10" in str(error.value)

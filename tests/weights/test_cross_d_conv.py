"""Cross-D Conv: what its kernels are, and what arrives in a network for volumes."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from weights.examples_dimensions import VolumeNet, labelled

from transfuse import transfer
from transfuse.core.errors import InputError, LayerError
from transfuse.core.watch import TransferWarning
from transfuse.losses.kernels import cross_matrix, fourier_shift, in_planes, inflated, turned_plane
from transfuse.weights import CrossDConv
from transfuse.weights.dimensions import CrossDConv2d, carry, flattened, plane_masks, raised


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def directions(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return F.normalize(torch.randn(count, 3), dim=1), torch.randn(count).tanh() * math.pi / 4


def as_the_paper_says(kernel: torch.Tensor, axis: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """The spectrum times phases of turned frequencies, without any simplification; complex."""
    f = torch.fft.fftfreq(kernel.shape[-1])
    grid = torch.stack(torch.meshgrid(f, f, f, indexing="ij"), -1)
    k1, k2, k3 = axis.tolist()
    turn = torch.eye(3) + angle * torch.tensor([[0, -k3, k2], [k3, 0, -k1], [-k2, k1, 0]])
    turned = torch.einsum("ij,xyzj->xyzi", turn, grid)
    phase = torch.exp(-2j * math.pi * turned.sum(-1))
    return torch.fft.ifftn(torch.fft.fftn(kernel, dim=(2, 3, 4)) * phase, dim=(2, 3, 4))


# What is done to kernels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 5, 7])
def test_the_layer_s_kernels_are_those_of_the_paper_s_formula(size):
    layer = CrossDConv2d(2, 3, size)
    axis, angle = directions(4)
    for i, kernel in enumerate(layer.kernels(axis, angle)):
        wanted = as_the_paper_says(layer.weight, axis[i], angle[i])
        assert wanted.imag.abs().max() < 1e-6
        assert torch.allclose(kernel, wanted.real[:, :, size // 2], atol=1e-12)


@pytest.mark.parametrize("size", [3, 5, 7])
def test_without_an_angle_the_kernel_is_rolled_by_one_voxel_along_every_axis(size):
    layer = CrossDConv2d(2, 3, size)
    axis, zero = directions(1)[0], torch.zeros(1)
    whole = fourier_shift(layer.weight, torch.ones(1, 3))[0]
    assert torch.allclose(whole, layer.weight.roll((1, 1, 1), (2, 3, 4)), atol=1e-6)
    plane = layer.weight[:, :, size // 2 - 1].roll((1, 1), (2, 3))
    assert torch.allclose(layer.kernels(axis, zero)[0], plane, atol=1e-6)


def test_with_an_angle_it_is_a_translation_by_one_less_the_angle_times_a_cross_product():
    layer, (axis, angle) = CrossDConv2d(2, 3, 5), directions(3)
    shift = 1 - angle[:, None] * torch.linalg.cross(axis, torch.ones_like(axis))
    moved = fourier_shift(layer.weight, shift)
    for i in range(3):
        assert torch.allclose(moved[i], as_the_paper_says(layer.weight, axis[i], angle[i]).real, atol=1e-12)
    assert torch.allclose(layer.kernels(axis, angle), moved[:, :, :, 2], atol=1e-12)


def test_about_the_diagonal_the_angle_means_nothing():
    layer, diagonal = CrossDConv2d(2, 3, 3), torch.ones(2, 3) / math.sqrt(3)
    one, other = layer.kernels(diagonal, torch.tensor([0.1, -0.7]))
    assert torch.allclose(one, other, atol=1e-12)


def test_odd_kernels_keep_their_norm_and_even_ones_lose_a_part_and_warn():
    shift = torch.randn(5, 3)
    for size, kept in ((3, True), (5, True), (7, True), (4, False)):
        kernel = torch.randn(2, 3, size, size, size)
        norms = fourier_shift(kernel, shift).flatten(1).norm(dim=1)
        assert bool(((norms - kernel.norm()).abs() < 1e-10).all()) == kept
        assert (norms <= kernel.norm() + 1e-10).all()
    with pytest.warns(TransferWarning, match="even size"):
        layer = CrossDConv2d(1, 2, 4)
    axis, angle = directions(1)
    wanted = as_the_paper_says(layer.weight, axis[0], angle[0])
    assert wanted.imag.abs().max() > 1e-3
    assert torch.allclose(layer.kernels(axis, angle)[0], wanted.real[:, :, 2], atol=1e-12)


def test_centred_kernels_stay_where_they_are_without_an_angle():
    layer = CrossDConv2d(2, 3, 3, centred=True)
    assert torch.allclose(layer.kernels(directions(1)[0], torch.zeros(1))[0], layer.weight[:, :, 1], atol=1e-12)


def test_a_rotation_by_a_right_angle_is_that_of_the_array():
    layer = CrossDConv2d(2, 3, 3, steer="rotate")
    axis = torch.eye(3)
    still = layer.kernels(axis, torch.zeros(3))
    assert torch.allclose(still, layer.weight[None, :, :, 1].expand_as(still), atol=1e-12)
    # By the right-hand rule height goes to width, and width to depth.
    about_depth = turned_plane(layer.weight, axis[:1], torch.full((1,), math.pi / 2), 1)[0]
    assert torch.allclose(about_depth, layer.weight[:, :, 1].rot90(1, (2, 3)), atol=1e-12)
    about_height = turned_plane(layer.weight, axis[1:2], torch.full((1,), math.pi / 2), 1)[0]
    assert torch.allclose(about_height, layer.weight.rot90(1, (4, 2))[:, :, 1], atol=1e-12)
    vector = torch.randn(3)
    assert torch.allclose(cross_matrix(axis) @ vector, torch.linalg.cross(axis, vector.expand(3, 3)), atol=1e-12)


# The layer ---------------------------------------------------------------------------------------------------------


def test_one_grouped_convolution_is_a_loop_over_samples():
    geometry = {"stride": 2, "padding": 2, "dilation": 2, "groups": 2}
    layer, images = CrossDConv2d(4, 6, 3, **geometry), torch.randn(70, 4, 9, 9)
    nn.init.normal_(layer.bias)
    kernels = layer.kernels(*layer.direction(images))
    wanted = [F.conv2d(x[None], k, layer.bias, **geometry) for x, k in zip(images, kernels, strict=True)]
    layer.steering[1].momentum = 0.0
    assert torch.allclose(layer(images), torch.cat(wanted), atol=1e-10)


def test_the_direction_is_a_unit_vector_and_an_angle_below_an_eighth_of_a_turn():
    layer, images = CrossDConv2d(3, 4, 3).eval(), 10 * torch.randn(6, 3, 7, 7)
    axis, angle = layer.direction(images)
    assert torch.allclose(axis.norm(dim=1), torch.ones(6), atol=1e-6)
    assert (angle.abs() <= math.pi / 4).all()
    rho = layer.steering(images)[0].flatten(1)
    v = [sum(math.exp(r) * r for r in row) / sum(math.exp(r) for r in row) for row in rho.tolist()]
    assert float(angle[0]) == pytest.approx(math.pi / 4 * math.tanh(v[3]))
    assert torch.allclose(axis[0], F.normalize(torch.tensor(v[:3]), dim=0), atol=1e-6)


@pytest.mark.parametrize("steer", ["shift", "rotate"])
def test_gradients_reach_the_kernels_and_the_steering(steer):
    layer, images = CrossDConv2d(2, 2, 3, steer=steer).eval(), torch.randn(3, 2, 5, 5)
    loss = layer(images).square().sum()
    loss.backward()
    for p in (layer.weight, layer.steering[0].weight, layer.steering[3].bias):
        place = tuple(0 for _ in p.shape)
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                p[place] += step
                values.append(float(layer(images).square().sum()))
                p[place] -= step
        assert float(p.grad[place]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)
        assert abs(float(p.grad[place])) > 1e-6


# Across dimensions -------------------------------------------------------------------------------------------------


def test_an_inflated_kernel_answers_a_volume_that_is_constant_in_depth_like_the_image():
    kernel, image = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 6, 6)
    volume = image.unsqueeze(2).expand(-1, -1, 5, -1, -1)
    wanted = F.conv2d(image, kernel)
    assert torch.allclose(F.conv3d(volume, inflated(kernel, 3)), wanted.unsqueeze(2).expand(-1, -1, 3, -1, -1))


def test_acs_is_three_convolutions_one_in_each_plane():
    kernel, volume = torch.randn(7, 3, 3, 3), torch.randn(2, 3, 6, 6, 6)
    parts = [
        F.conv3d(volume, kernel[:2].unsqueeze(2), padding=(0, 1, 1)),
        F.conv3d(volume, kernel[2:4].unsqueeze(3), padding=(1, 0, 1)),
        F.conv3d(volume, kernel[4:].unsqueeze(4), padding=(1, 1, 0)),
    ]
    assert torch.allclose(F.conv3d(volume, in_planes(kernel, 3), padding=1), torch.cat(parts, 1))


def test_kernels_are_copied_exactly_both_ways_and_statistics_with_them():
    volumes = VolumeNet()
    images = flattened(volumes)
    images(torch.randn(4, 1, 5, 5))  # statistics that are not those of the beginning
    assert isinstance(images.conv2, CrossDConv2d)
    assert isinstance(images.point, nn.Conv2d)
    carry(images, volumes)
    assert torch.equal(volumes.conv1.weight, images.conv1.weight)
    assert torch.equal(volumes.norm.running_mean, images.norm.running_mean)
    assert torch.equal(volumes.point.weight[:, :, 0], images.point.weight)
    back = flattened(VolumeNet(1))
    steering = copy.deepcopy(back.conv1.steering.state_dict())
    carry(volumes, back)
    assert torch.equal(back.conv2.weight, volumes.conv2.weight)
    assert all(torch.equal(v, back.conv1.steering.state_dict()[k]) for k, v in steering.items())


def test_a_network_that_is_flattened_and_raised_again_has_its_old_shape():
    old = VolumeNet()
    assert isinstance(raised(nn.Conv2d(1, 2, 3)), nn.Conv3d)
    for kernels in ("cross", "inflate"):
        again = raised(flattened(old, kernels))
        assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in old.state_dict().items()}
        assert again(torch.randn(2, 1, 5, 5, 5)).shape == (2, 3)


def test_what_does_not_match_is_named_and_nothing_is_copied():
    source, target = flattened(VolumeNet(), "inflate"), VolumeNet(1)
    source.more = nn.Linear(2, 2)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(LayerError, match="'more'"):
        carry(source, target, "inflate")
    with pytest.raises(LayerError, match="kernels='inflate'"):
        carry(flattened(VolumeNet(), "inflate"), target)
    del source.more
    source.fc = nn.Linear(4, 5)
    with pytest.raises(LayerError, match=r"fc.weight is \(3, 4\) in the target, \(5, 4\)"):
        carry(source, target, "inflate")
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())
    with pytest.raises(LayerError, match="ConvTranspose3d"):
        flattened(nn.Sequential(nn.ConvTranspose3d(1, 1, 2)))
    with pytest.raises(LayerError, match="same along all axes"):
        flattened(nn.Sequential(nn.Conv3d(1, 1, (1, 3, 3))))
    with pytest.raises(LayerError, match="pads with 'reflect'"):
        flattened(nn.Sequential(nn.Conv3d(1, 1, 3, padding=1, padding_mode="reflect")))


# The method --------------------------------------------------------------------------------------------------------


def run_of(method: CrossDConv) -> nn.Module:
    torch.set_default_dtype(torch.float32)
    options = {"steps": 3, "batch_size": 4, "lr": 1e-2}
    return transfer(method, labelled(12, 2, 5), VolumeNet(), labelled(8, 3, 3), test=labelled(6, 3, 3), **options).model


def test_what_is_deployed_is_the_target_s_own_class_and_images_have_formed_it():
    model = run_of(CrossDConv(tune="head", image_epochs=2))
    assert type(model) is VolumeNet
    assert not torch.equal(model.conv1.weight, VolumeNet().conv1.weight)
    assert model.norm.num_batches_tracked == 6  # of the images, whose epoch has three batches; none of the volumes


def test_acs_kernels_stay_in_their_planes_while_they_learn():
    model = run_of(CrossDConv(kernels="acs"))
    for weight, mask in plane_masks(model).items():
        assert (weight[mask == 0] == 0).all()
        assert (weight[mask == 1] != 0).all()


def test_planes_are_reported():
    method = CrossDConv(kernels="inflate")
    assert method.panels() == []
    torch.set_default_dtype(torch.float32)
    data, images = labelled(8, 3, 3), labelled(12, 2, 5)
    result = transfer(method, images, VolumeNet(), data, test=data, steps=2, batch_size=4)
    (panel,) = [p for p in result.report.panels if "plane" in p.title]
    assert panel.series["conv1"] == [
        (0.0, pytest.approx(1 / 3)),
        (1.0, pytest.approx(1 / 3)),
        (2.0, pytest.approx(1 / 3)),
    ]


def test_wrong_arguments_are_refused():
    for wrong in (
        {"kernels": "x"},
        {"steer": "x"},
        {"steer": "rotate", "centred": True},
        {"tune": "x"},
        {"image_epochs": 0},
    ):
        with pytest.raises(InputError, match="CrossDConv"):
            CrossDConv(**wrong)
    with pytest.raises(InputError, match="single voxel"):
        CrossDConv2d(1, 1, 1)
    torch.set_default_dtype(torch.float32)
    with pytest.raises(InputError, match="ema"):
        transfer(CrossDConv(), labelled(8, 2, 3), VolumeNet(), labelled(8, 3, 3), steps=2, ema=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CrossDConv2d(1, 1, 3)

from __future__ import annotations

import pytest
import torch
from helpers import CNN, images, trainer
from torch import Tensor, nn

from transfuse.core.errors import ShapeError
from transfuse.core.projector import Projector, resize_map
from transfuse.distill import Hints, Labels
from transfuse.models.vit import ViTTiny

WIDTH = {"narrow": torch.randn(2, 4), "wide": torch.randn(2, 6)}
MAPS = {"small": torch.randn(2, 3, 2, 2), "large": torch.randn(2, 5, 4, 4), "flat": torch.randn(2, 5, 2, 8)}
TOKENS = {"short": torch.randn(2, 4, 3), "long": torch.randn(2, 16, 6), "class token": torch.randn(2, 17, 6)}


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (a, b)
        for kinds in ([WIDTH], [MAPS, TOKENS])
        for a in [t for kind in kinds for t in kind.values()]
        for b in [t for kind in kinds for t in kind.values()]
    ],
    ids=lambda t: "x".join(map(str, t.shape)),
)
def test_gives_the_teachers_shape_and_a_gradient(student, teacher):
    projector = Projector(student, teacher)
    student = student.clone().requires_grad_()
    projected = projector(student, teacher)
    assert projected.shape == teacher.shape
    projected.square().sum().backward()
    assert student.grad.abs().sum() > 0
    for parameter in projector.parameters():
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("feature", [WIDTH["wide"], MAPS["large"], TOKENS["long"]], ids=["width", "map", "tokens"])
def test_is_the_identity_where_shapes_agree(feature):
    projector = Projector(feature, feature)
    assert list(projector.parameters()) == []
    assert torch.equal(projector(feature, feature), feature)


def test_maps_and_tokens_of_one_width_are_the_same_thing_row_by_row():
    maps = torch.randn(2, 6, 4, 4)
    tokens = maps.flatten(2).transpose(1, 2)
    assert torch.equal(Projector(tokens, maps)(tokens, maps), maps)
    assert torch.equal(Projector(maps, tokens)(maps, tokens), tokens)


def test_the_class_token_is_left_out_of_a_map():
    maps = torch.randn(2, 6, 4, 4)
    tokens = torch.cat([torch.full((2, 1, 6), 99.0), maps.flatten(2).transpose(1, 2)], 1)
    assert torch.equal(Projector(tokens, maps)(tokens, maps), maps)


def test_token_counts_may_change_from_batch_to_batch():
    projector = Projector(torch.randn(2, 5, 3), torch.randn(2, 7, 6))
    assert projector(torch.randn(2, 9, 3), torch.randn(2, 4, 6)).shape == (2, 4, 6)


def test_averages_pixels_down():
    maps = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resize_map(maps, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (WIDTH["wide"], MAPS["large"]),
        (TOKENS["short"], WIDTH["wide"]),
        (torch.randn(2, 1, 1, 1, 1), MAPS["large"]),
        (torch.randn(2), torch.randn(2)),
    ],
)
def test_shapes_that_do_not_match_are_refused(student, teacher):
    with pytest.raises(ShapeError, match="no projector from features"):
        Projector(student, teacher)


def test_tokens_that_are_no_square_cannot_become_a_map():
    tokens = torch.randn(2, 7, 6)
    with pytest.raises(ShapeError, match="7 tokens are no square"):
        Projector(tokens, MAPS["large"])(tokens, MAPS["large"])


def vit(depth: int, dim: int = 8) -> nn.Module:
    return ViTTiny(image=4, patch=2, dim=dim, depth=depth, heads=2, classes=3)


@pytest.mark.parametrize(
    ("student", "teacher", "taps"),
    [
        (CNN(), vit(2, dim=12), ("layer2", "blocks.1")),
        (vit(2), CNN(width=5), ("blocks.1", "layer2")),
        (vit(4), vit(12, dim=12), ("blocks.3", "blocks.11")),
        (CNN(), CNN(width=6), ("penultimate", "penultimate")),
    ],
    ids=["CNN to ViT", "ViT to CNN", "12 layers to 4", "penultimate"],
)
def test_is_trained_with_the_method_and_not_part_of_the_student(student, teacher, taps):
    method = Labels() + Hints(*taps)
    keys = list(student.state_dict())
    values: list[float] = []
    first: list[Tensor] = []

    def note(run, record) -> None:
        first[:] = first or [p.detach().clone() for p in method.parameters()]
        values.append(record["terms"]["hints"]["raw"])

    deployed = trainer(method, student, teacher, images(), listener=note, steps=30, optimizer="adam", lr=0.01).fit()
    assert deployed is student
    assert list(deployed.state_dict()) == keys
    assert values[-1] < values[0]
    moved = [not torch.equal(a, b) for a, b in zip(first, method.parameters(), strict=True)]
    assert moved
    assert all(moved)

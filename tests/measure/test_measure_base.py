from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import torch
from torch import nn

from transfuse.core.card import Card
from transfuse.core.errors import InputError, ShapeError
from transfuse.core.probe import no_trace
from transfuse.measure import Interval, Measure, Measurement, Table


class Looks(Measure):
    card = Card(paper="nobody, nowhere")

    def __init__(self, closely: bool = False, depth: int = 3):
        self.closely, self.depth = closely, depth

    def look(self, source: Any, target: Any, data: Any) -> Measurement:
        source(torch.rand(4, 3)).sum().backward()
        assert not source.training
        return Measurement(repr(self), {"drawn": float(torch.rand(()))})


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def test_gradients_modes_and_random_numbers_are_put_back_and_the_seed_decides() -> None:
    source, state = model().train(), torch.get_rng_state()
    source[0].weight.grad = torch.ones(3, 3)
    one, other, third = (Looks().measure(source=source, seed=seed) for seed in (0, 0, 1))
    assert torch.get_rng_state().equal(state) and source.training
    assert source[0].weight.grad.equal(torch.ones(3, 3)) and source[0].bias.grad is None
    assert one["drawn"] == other["drawn"] != third["drawn"]


def test_all_is_put_back_after_an_error_too() -> None:
    source = model().eval()
    mean = source[1].running_mean.clone()

    def fail() -> None:
        with no_trace(source, seed=0):
            source.train()(torch.rand(4, 3))
            source[0].weight.requires_grad_(False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert source[1].running_mean.equal(mean) and not source.training and source[0].weight.requires_grad


def test_models_inside_what_wraps_them_are_looked_after() -> None:
    class Wrapper:
        model = nn.Linear(1, 1)

    seen: list[bool] = []

    class Asks(Looks):
        def look(self, source: Any, target: Any, data: Any) -> Measurement:
            seen.extend([source.model.training, target["a"][0].training])
            return Measurement(repr(self))

    Asks().measure(source=Wrapper(), target={"a": [model().train()]})
    assert seen == [False, False]


def test_names_itself_with_what_differs_from_the_defaults() -> None:
    assert repr(Looks()) == "Looks()" and repr(Looks(depth=4)) == "Looks(depth=4)"


def test_a_measurement_is_json() -> None:
    found = Measurement(
        "M()",
        {"a": 1.5, "b": float("nan")},
        {"a": Interval(1.5, 1, 2)},
        {"t": Table(("x",), ("y", "z"), torch.tensor([[1.0, torch.inf]]))},
        {"i": torch.tensor([[[0.0, 1.0]]])},
        ["note"],
    )
    read = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert read["numbers"] == {"a": 1.5, "b": None} and read["tables"]["t"]["values"] == [[1.0, None]]
    assert read["intervals"]["a"]["high"] == 2 and read["notes"] == ["note"]
    assert base64.b64decode(read["images"]["i"]["bytes"]) == bytes([0, 255]) and read["images"]["i"]["shape"] == [
        1,
        1,
        2,
    ]
    assert found.tables["t"]["x", "y"] == 1 and found["a"] == 1.5


def test_a_report_can_show_it() -> None:
    from pydantic import TypeAdapter

    from transfuse.report.panels import Images, Matrix, Panel

    table = Table(("x",), ("y", "z"), torch.tensor([[1.0, torch.nan]]))
    found = Measurement("M()", tables={"t": table}, images={"i": torch.rand(20, 3, 2)}, notes=["so it is"]).panels()
    matrix, images = (TypeAdapter(Panel).validate_python(panel) for panel in found)
    assert isinstance(matrix, Matrix) and matrix.values == [[1.0, None]] and matrix.note == "so it is."
    assert isinstance(images, Images) and len(images.images) == 8 and len(images.images[0].pixels) == 3


def test_tables_have_names_for_all_their_numbers() -> None:
    with pytest.raises(ShapeError, match="1 rows and 1 columns cannot hold values of shape \\(2, 1\\)"):
        Table(("x",), ("y",), torch.zeros(2, 1))


def test_data_must_be_given() -> None:
    from transfuse.measure.base import batches

    with pytest.raises(InputError, match="pass data="):
        list(batches(None, 4))
    assert [b.size for b in batches(torch.zeros(10, 2), 4)] == [3, 3, 4]

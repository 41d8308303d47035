"""DAN: the discrepancy of every layer that is named, counted once per micro-batch."""

from __future__ import annotations

import pytest
import torch
from domains import domains, source
from helpers import CNN, first_gradients, images, trainer

from transfuse.adapt import DAN, DANN
from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, LayerError
from transfuse.core.run import Run
from transfuse.losses import mmd


def test_the_loss_is_the_discrepancy_of_each_layer():
    method, model = DAN(layers=("penultimate", "layer1", "fc")), CNN()
    run = Run({"target": model}, {})
    run.install(method.wants())
    here, there = (run("target", Batch(inputs=x)) for x in (source(10)[0], images(8)[0]))
    found = method.loss(here, there, None, None, Clock())
    assert list(found) == ["mmd penultimate", "mmd layer1", "mmd fc"]
    for layer in method.layers:
        expected = mmd(here.features[layer], there.features[layer])
        assert found[f"mmd {layer}"].mean.item() == pytest.approx(expected.item())
    assert torch.equal(there.features["fc"], there.logits)


def test_domains_that_are_equal_have_no_discrepancy_and_training_shrinks_it():
    pictures, labels = source()
    same = trainer(DAN(), CNN(), None, domains(pictures, (pictures, labels)), steps=1, shuffle=False, batch_size=24)
    same.fit()
    assert same.history[-1]["terms"]["mmd penultimate"]["raw"] == pytest.approx(0.0, abs=1e-6)

    def left(weight: float) -> float:
        model = CNN(width=8)
        run = trainer(weight * DAN(), model, None, domains(images(24)[0] + 1, source()), steps=60, batch_size=24)
        run.fit()
        return run.history[-1]["terms"]["mmd penultimate"]["raw"]

    assert left(5.0) < 0.3 * left(0.0)


def test_it_adds_to_the_methods_of_its_family():
    both = first_gradients(DANN(hidden=8) + 2 * DAN(), CNN(), None, domains())
    only, alone = (first_gradients(m, CNN(), None, domains()) for m in (DANN(hidden=8), 2 * DAN()))
    labels = first_gradients(0 * DAN(), CNN(), None, domains())
    for name in labels:
        expected = only[name] + alone[name] - labels[name]
        assert torch.allclose(both[name], expected, atol=1e-6), name


def test_arguments_that_make_no_sense_are_refused():
    for bad in ({"layers": "penultimate"}, {"layers": ()}, {"kernels": 0}):
        with pytest.raises(InputError, match="name layers in a list"):
            DAN(**bad)
    with pytest.raises(LayerError, match="no layer 'layer9'"):
        trainer(DAN(layers=["layer9"]), CNN(), None, domains()).fit()

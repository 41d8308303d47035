"""MCD: three phases, each of which moves what the paper says, on the loss that the paper says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from domains import domains, source
from helpers import CLASSES, CNN, images, trainer
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.adapt import MCD
from transfuse.adapt.mcd import discrepancy
from transfuse.core.errors import InputError, LayerError


def features(model: CNN, pictures: Tensor) -> Tensor:
    return model.layer2(model.layer1(pictures).tanh()).tanh().mean((2, 3))


def test_discrepancy_is_the_mean_difference_of_probabilities():
    one, other = torch.randn(2, 6, CLASSES).unbind()
    p, q = one.double().softmax(1).tolist(), other.double().softmax(1).tolist()
    expected = [sum(abs(a - b) for a, b in zip(r, s, strict=True)) / CLASSES for r, s in zip(p, q, strict=True)]
    assert discrepancy(one, other).tolist() == pytest.approx(expected, abs=1e-6)
    assert discrepancy(one, one).abs().max() == 0
    assert torch.allclose(discrepancy(one, other), discrepancy(other, one))
    certain = 100 * torch.eye(CLASSES)
    assert discrepancy(certain, certain.roll(1, 0)).tolist() == pytest.approx([2 / CLASSES] * CLASSES)


class Watched(MCD):
    """Notes the state of everything after each phase."""

    def __init__(self, repeats: int = 4):
        super().__init__(repeats)
        self._moved: list[tuple[str, set[str]]] = []
        self._gradients: list[dict[str, Tensor]] = []
        self._before: dict[str, Tensor] = {}

    def _all(self, run: Any) -> dict[str, nn.Parameter]:
        model = {f"model.{n}": p for n, p in run["target"].named_parameters()}
        return model | {f"second.{n}": p for n, p in self.second.named_parameters()}

    def stage(self, i: int, run: Any) -> Any:
        self._before = {n: p.detach().clone() for n, p in self._all(run).items()}
        return super().stage(i, run)

    def after_update(self, phase: Any, values: Any, run: Any) -> None:
        now = self._all(run)
        self._moved.append((phase.name[0], {n for n, p in now.items() if not torch.equal(p, self._before[n])}))
        self._gradients.append({n: p.grad.clone() for n, p in now.items() if p in set(phase.params)})
        self._before = {n: p.detach().clone() for n, p in now.items()}


def watched(repeats: int = 4, steps: int = 1) -> tuple[Watched, CNN]:
    method, model = Watched(repeats), CNN()
    options: dict[str, Any] = {"batch_size": 24, "shuffle": False, "weight_decay": 0.0, "momentum": 0.0}
    trainer(method, model, None, domains(images(24)[0]), steps=steps, **options).fit()
    return method, model


CLASSIFIERS = {"model.fc.weight", "model.fc.bias", "second.weight", "second.bias"}
EXTRACTOR = {f"model.{layer}.{kind}" for layer in ("layer1", "layer2") for kind in ("weight", "bias")}


def test_each_phase_moves_its_own_parameters_and_the_last_one_repeats():
    method, _ = watched(repeats=3, steps=2)
    expected = [("A", EXTRACTOR | CLASSIFIERS), ("B", CLASSIFIERS), *[("C", EXTRACTOR)] * 3]
    assert method._moved == 2 * expected


def test_the_three_gradients_are_those_of_the_papers_losses():
    method, reference = Watched(repeats=1), CNN()
    (pictures, labels), target = source(), images(24)[0]
    options: dict[str, Any] = {"batch_size": 24, "shuffle": False, "weight_decay": 0.0, "momentum": 0.0}
    trained = trainer(method, CNN(), None, domains(target), steps=1, schedule="constant", lr=0.1, **options)
    made: list[nn.Module] = []
    build = method.build
    method.build = lambda *outputs: (build(*outputs), made.append(copy.deepcopy(method.second)))[0]  # type: ignore
    trained.fit()
    second = made[0]
    named = {f"model.{n}": p for n, p in reference.named_parameters()}
    named |= {f"second.{n}": p for n, p in second.named_parameters()}

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        f = features(reference, x)
        return reference.fc(f), second(f)

    def classified() -> Tensor:
        return sum(F.cross_entropy(logits, labels) for logits in both(pictures))

    losses = {
        "A": classified,
        "B": lambda: classified() - discrepancy(*both(target)).mean(),
        "C": lambda: discrepancy(*both(target)).mean(),
    }
    for (phase, _), gradients in zip(method._moved, method._gradients, strict=True):
        expected = dict(
            zip(gradients, torch.autograd.grad(losses[phase](), [named[n] for n in gradients]), strict=True)
        )
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, expected[name], atol=1e-6), (phase, name)
        with torch.no_grad():
            for name, gradient in expected.items():
                named[name].sub_(0.1 * gradient)


def test_the_classifiers_start_apart_and_the_deployed_model_is_the_users():
    method, model = watched()
    assert isinstance(method.second, nn.Linear)
    assert method.second.weight.shape == model.fc.weight.shape
    assert not torch.allclose(method.second.weight, model.fc.weight, atol=0.05)
    assert method.deploy(model) is model


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="1 or more"):
        MCD(repeats=0)

    class Headless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, CLASSES, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3))

    with pytest.raises(LayerError, match="no linear layer"):
        trainer(MCD(), Headless(), None, domains()).fit()

"""The study of sources: paired runs, gains over the target alone, rank correlations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from transfuse.adapt import KTF, SourceStudy, source_study
from transfuse.adapt.source_study import Outcome
from transfuse.core.errors import InputError
from transfuse.datasets import noise, permuted_classes
from transfuse.losses import IGNORE
from transfuse.measure import spearman
from transfuse.models import SphereClassifier

WIDTH, CLASSES = 8, 3
TRAINING: dict[str, Any] = {"steps": 5, "optimizer": "adam", "lr": 0.01, "weight_decay": 0.0, "schedule": "constant"}


def target() -> nn.Module:
    return SphereClassifier(inputs=4, width=WIDTH, classes=CLASSES)


def images(count: int = 30) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return x, x[:, :CLASSES].argmax(1)


def few() -> tuple[Tensor, Tensor]:
    x, y = images()
    y[9:] = IGNORE
    return x, y


def gaussian(seed: int) -> TensorDataset:
    train = noise(classes=CLASSES, per_class=6, width=WIDTH, seed=seed).train
    assert isinstance(train, TensorDataset)
    return train


def sources() -> dict[str, Any]:
    fixed = gaussian(7)
    return {"noise": gaussian, "fixed": fixed, "renamed": permuted_classes(fixed)}


def studied(*methods: KTF, seeds: tuple[int, ...] = (0, 1), **changes: Any) -> SourceStudy:
    given = {"sources": sources(), "target": target, "data": few(), "test": images(), **changes}
    return source_study(methods or (KTF(),), **given, seeds=seeds, device="cpu", **TRAINING)


def test_every_source_method_and_seed_is_run_once_and_the_target_alone_once_per_seed():
    study = studied(KTF(), KTF(mu=0.1))
    found = [(o.source, o.method, o.seed) for o in study.outcomes]
    assert len(found) == len(set(found)) == 3 * 2 * 2
    assert [(o.source, o.method, o.seed) for o in study.baseline] == [("none", "KTF(beta=0, mu=0)", s) for s in (0, 1)]


def test_a_source_that_is_not_used_gains_exactly_nothing():
    study = studied(KTF(beta=0, mu=0))
    assert {o.gain for o in study.outcomes} == {0.0}


def test_gains_are_over_the_target_alone_with_the_same_seed():
    study = studied(KTF(beta=5.0, mu=5.0))
    alone = {o.seed: o.accuracy for o in study.baseline}
    for o in study.outcomes:
        assert o.gain == o.accuracy - alone[o.seed]
    assert study.gain("fixed", "KTF(beta=5.0, mu=5.0)") == pytest.approx(
        sum(o.gain for o in study.outcomes if o.source == "fixed") / 2
    )


def test_functions_of_the_seed_are_called_with_it():
    seen: list[int] = []

    def drawn(seed: int) -> TensorDataset:
        seen.append(seed)
        return gaussian(seed)

    studied(sources={"drawn": drawn}, seeds=(3,))
    assert seen == [3, 3]  # for the target alone and for the method


def outcome(source: str, accuracy: float, term: float) -> Outcome:
    return Outcome(source, "M()", 0, accuracy, 0.0, {"source": term})


def test_the_correlation_is_that_of_accuracy_with_the_negative_of_a_term():
    rising = [outcome("a", 0.5, 3.0), outcome("b", 0.6, 2.0), outcome("c", 0.9, 1.0)]
    assert SourceStudy(rising, []).correlation("M()", "source") == pytest.approx(1.0)
    swapped = [outcome("a", 0.5, 3.0), outcome("b", 0.9, 2.0), outcome("c", 0.6, 1.0)]
    assert SourceStudy(swapped, []).correlation("M()", "source") == pytest.approx(0.5)


def test_rank_correlation_agrees_with_scipy_also_on_ties():
    stats = pytest.importorskip("scipy.stats")
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        one, other = (torch.randint(6, (20,), generator=draw).float() for _ in range(2))
        assert spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic, abs=1e-6)
    assert math.isnan(spearman(torch.zeros(4), torch.arange(4.0)))


def test_the_table_has_a_row_for_the_target_alone_and_for_every_source():
    lines = str(studied()).splitlines()
    assert lines[0].split() == ["source", "method", "accuracy", "gain"]
    assert [line.split()[0] for line in lines[1:]] == ["none", "noise", "fixed", "renamed"]
    assert all(line.split()[-1][0] in "+-" for line in lines[2:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: studied(sources={}), "needs methods and sources, found 1 and 0"),
        (lambda: studied(test=[images()]), "map-style data set or tensors"),
        (lambda: studied(seeds=(0,)).correlation("KTF()", "disc"), "has no term 'disc': it has labels, source"),
        (lambda: studied(seeds=(0,)).gain("nose", "KTF()"), "no outcome of 'KTF\\(\\)' with nose"),
        (lambda: SourceStudy([outcome("a", 0.5, 1.0)], []).correlation("M()", "source"), "three at least, found 1"),
    ],
)
def test_what_a_study_cannot_answer(call, message):
    with pytest.raises(InputError, match=message):
        call()

"""The least that every merge runs on."""

from __future__ import annotations

from collections.abc import Callable

from helpers import CNN, Example, images

from transfuse.core.method import Method
from transfuse.weights import (
    DARE,
    DELLA,
    EMR,
    SCE,
    SLERP,
    TIES,
    TSVM,
    Breadcrumbs,
    Fisher,
    GreedySoup,
    IsoC,
    Karcher,
    Linear,
    ModelStock,
    MultiSLERP,
    NearSwap,
    NuSLERP,
    Passthrough,
    RegMean,
    TaskArithmetic,
)


def with_data(method: Method, several: bool = False) -> Example:
    held_out = images(6, seed=1)
    pictures, labels = images(12)
    labels = labels.clamp(min=0)
    data = {str(i): (pictures.roll(i, 0), labels) for i in range(3)} if several else (pictures, labels)
    sources = [CNN(norm=True, seed=1 + i) for i in range(3)]
    return Example(method, CNN(norm=True), sources, data, held_out, {"batch_size": 4})


def example(method: Method, models: int = 3) -> Example:
    held_out = images(6, seed=1)
    return Example(method, CNN(norm=True), [CNN(norm=True, seed=1 + i) for i in range(models)], None, held_out)


EXAMPLES: dict[str, Callable[[], Example]] = {
    "Breadcrumbs": lambda: example(Breadcrumbs(0.5, consensus=True)),
    "DARE": lambda: example(DARE([0.5, 0.6, 0.7], consensus=True)),
    "DELLA": lambda: example(DELLA(0.6)),
    "EMR": lambda: example(EMR()),
    "Fisher": lambda: with_data(Fisher([1.0, 2.0, 1.0]), several=True),
    "GreedySoup": lambda: with_data(GreedySoup()),
    "RegMean": lambda: with_data(RegMean()),
    "IsoC": lambda: example(IsoC(0.5)),
    "Karcher": lambda: example(Karcher()),
    "Linear": lambda: example(Linear([0.5, 0.3, 0.2])),
    "ModelStock": lambda: example(ModelStock(rows=True)),
    "MultiSLERP": lambda: example(MultiSLERP([0.5, 0.3, 0.2])),
    "NearSwap": lambda: example(NearSwap(0.01), models=1),
    "NuSLERP": lambda: example(NuSLERP([1.0, 2.0], along="rows"), models=2),
    "Passthrough": lambda: example(Passthrough({"fc.*": 0.5, "*": 1.0}), models=1),
    "SCE": lambda: example(SCE(0.5)),
    "SLERP": lambda: example(SLERP({"layer1.*": 0.25, "*": 0.5}), models=2),
    "TIES": lambda: example(TIES(0.3, [1.0, 0.5, 1.0])),
    "TSVM": lambda: example(TSVM()),
    "TaskArithmetic": lambda: example(TaskArithmetic([1.0, -0.5, 0.3])),
}

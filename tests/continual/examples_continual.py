"""Tiny runs of every method of the family, and the tasks that its tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from helpers import Example
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from transfuse.continual import ADAM, CUBER, EWC, GPM, TRGP, FineTune, LwF, Replay, SimpleCIL, TaskModel
from transfuse.continual.base import Learner
from transfuse.core.run import Run
from transfuse.core.streams import as_data
from transfuse.core.trainer import Trainer
from transfuse.core.training import Training

SIDE = 6
Task = tuple[Tensor, Tensor]


Groups = Sequence[Sequence[int]]


def tasks(classes: Groups = ((0, 1), (1, 2), (3, 4)), count: int = 12, seed: int = 0, noise: float = 0.5) -> list[Task]:
    """For each task `count` images per class: a pattern of the class, and noise; labels are global."""
    draw = torch.Generator().manual_seed(seed)
    patterns = torch.randn(1 + max(map(max, classes)), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(99))
    found = []
    for group in classes:
        labels = torch.tensor(group).repeat_interleave(count)
        found.append((patterns[labels] + noise * torch.randn(len(labels), 1, SIDE, SIDE, generator=draw), labels))
    return found


def domains(count: int = 20, seed: int = 0, noise: float = 1.0) -> list[Task]:
    """Three tasks with the same four classes, whose patterns have other pixels in other places in every task."""
    order = torch.Generator().manual_seed(7)
    found = []
    for x, y in tasks(((0, 1, 2, 3),) * 3, count, seed, noise):
        found.append((x.flatten(1)[:, torch.randperm(SIDE * SIDE, generator=order)].view_as(x), y))
    return found


class Net(nn.Module):
    """Convolution, batch normalisation, linear layer and head `fc`, all but the norm without biases if asked."""

    def __init__(self, classes: int = 5, norm: bool = True, bias: bool = True, dropout: float = 0.2, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=bias)
            self.norm: nn.Module = nn.BatchNorm2d(4) if norm else nn.Identity()
            self.linear = nn.Linear(36, 8, bias=bias)
            self.drop = nn.Dropout(dropout)
            self.fc = nn.Linear(8, classes, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(images)).relu()
        return self.fc(self.drop(self.linear(x.flatten(1)).relu()))


def example(method: Learner, net: nn.Module | None = None) -> Example:
    data, test = ([TensorDataset(*task) for task in tasks(seed=seed)] for seed in (0, 1))
    options = {"steps": 4, "batch_size": 8, "optimizer": "sgd", "lr": 0.05}
    return Example(method, Net() if net is None else net, data=data, test=test, options=options)


EXAMPLES: dict[str, Callable[[], Example]] = {
    "FineTune": lambda: example(FineTune()),
    "EWC": lambda: example(EWC(samples=6)),
    "LwF": lambda: example(LwF()),
    "Replay": lambda: example(Replay(per_class=2, batch=4)),
    "GPM": lambda: example(GPM(threshold=0.9)),
    "TRGP": lambda: example(TRGP(eps1=0.1, threshold=0.9)),
    "CUBER": lambda: example(CUBER(eps1=0.1, threshold=0.9)),
    "SimpleCIL": lambda: example(SimpleCIL()),
    "ADAM": lambda: example(ADAM()),
}


def trainer(method: Learner, net: nn.Module, data: Sequence[object], **options: object) -> Trainer:
    """A trainer over a stream of tasks, plain SGD unless told otherwise."""
    settings = {"batch_size": 8, "optimizer": "sgd", "lr": 0.05, "momentum": 0.0, "weight_decay": 0.0}
    own = {name: options.pop(name) for name in ("folder", "listener", "validate", "sync") if name in options}
    settings |= {"schedule": "constant", "checkpoint_every": 0.0} | options
    if "epochs" not in settings:
        settings.setdefault("steps", 6)
    streams = {str(i): as_data(d) for i, d in enumerate(data)}
    return Trainer(method, {"target": net}, streams, Training(**settings), **own)


def ready(method: Learner, net: nn.Module, data: Sequence[Task]) -> Run:
    """A run in which a method has been set up and nothing else has happened."""
    run = Run({"target": net}, {str(i): as_data(d) for i, d in enumerate(data)})
    run.install(method.wants())
    run.set_modes(set())
    with run.probe():
        method.setup(run, run.data["0"].sample(8))
    return run


def accuracy(model: nn.Module, data: Sequence[Task]) -> list[float]:
    """On every task, in eval mode; the model itself stays in its mode."""
    model = copy.deepcopy(model).eval()
    number = isinstance(model, TaskModel)
    answers = [(model(x, task=i) if number else model(x)).argmax(1) == y for i, (x, y) in enumerate(data)]
    return [float(right.float().mean()) for right in answers]

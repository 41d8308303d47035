"""Fashion-MNIST as other domains, as a stream of tasks, and as clients with private shards.

Pictures are changed by :mod:`transfuse.datasets.pictures` and dealt out by :mod:`transfuse.datasets.partition`; the
plain data set is in :mod:`transfuse.datasets.fashion`. All are drawn from the official files, and the test parts
only from the official test pictures (the clients' too, unless they say otherwise).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from transfuse.core.errors import InputError
from transfuse.datasets.fashion import CLASSES, fashion_mnist
from transfuse.datasets.partition import dirichlet
from transfuse.datasets.pictures import edges, noisy, rotated, shifted, smaller
from transfuse.datasets.splits import Splits, stratified

Change = Callable[[Tensor], Tensor]


def fashion_classes(
    classes: Sequence[int], renumber: bool = True, size: int | None = None, folder: str | Path | None = None
) -> Splits:
    """Some classes of Fashion-MNIST.

    Args:
        classes: which, in the order of their new labels.
        renumber: labels count from 0; False keeps the official ones.
        size: take only the first `size` training pictures of all classes.
        folder: as in :func:`~transfuse.datasets.fashion.fashion_mnist`.

    Raises:
        InputError, StoreError: as in `fashion_mnist` and :meth:`Splits.only`.
    """
    return fashion_mnist(folder, size=size).only(classes, renumber)


def rotated_fashion(
    angle: float = 30.0, source: int = 6000, target: int = 4000, side: int = 28, folder: str | Path | None = None
) -> Splits:
    """Two domains: upright pictures and others turned by `angle` degrees; see :func:`fashion_domains`."""
    return fashion_domains(partial(rotated, angle=angle), f"turned by {angle:g}", source, target, side, folder)


def shifted_fashion(
    contrast: float = -0.5,
    brightness: float = 0.0,
    noise: float = 0.1,
    seed: int = 0,
    source: int = 6000,
    target: int = 4000,
    side: int = 28,
    folder: str | Path | None = None,
) -> Splits:
    """Two domains: plain pictures and others of another contrast, brightness and noise; see :func:`fashion_domains`.

    Args:
        contrast, brightness: see :func:`~transfuse.datasets.pictures.shifted`; the default is a dull negative.
        noise: standard deviation; `seed` is that of the noise.
        source, target, side, folder: see :func:`fashion_domains`.
    """

    def change(images: Tensor) -> Tensor:
        return noisy(shifted(images, contrast, brightness), noise, seed)

    name = f"contrast {contrast:g}, brightness {brightness:g}, noise {noise:g}"
    return fashion_domains(change, name, source, target, side, folder)


def edge_fashion(source: int = 6000, target: int = 4000, side: int = 28, folder: str | Path | None = None) -> Splits:
    """Two domains: plain pictures and the edge maps of others; see :func:`fashion_domains`."""
    return fashion_domains(edges, "edges", source, target, side, folder)


def fashion_domains(
    change: Change,
    name: str,
    source: int = 6000,
    target: int = 4000,
    side: int = 28,
    folder: str | Path | None = None,
) -> Splits:
    """A labelled source domain and a target domain that is changed Fashion-MNIST.

    `Splits.source` has the first `source` training pictures as they are; train has the next `target` ones, changed
    (with their labels, which an adaptation does not look at); validate and test have all official ones, changed.

    Args:
        change: pictures `(samples, 1, 28, 28)` to pictures of the other domain.
        name: of the change, for reports.
        source, target: how many training pictures of each domain; no picture is in both.
        side: after the change, pixels are averaged down to `side` x `side`: 28, 14 or 7.
        folder: as in :func:`~transfuse.datasets.fashion.fashion_mnist`.

    Raises:
        InputError: `side` is none of these, or more pictures are asked for than there are.
        StoreError: the files cannot be read.
    """
    if source < 1 or target < 1:
        raise InputError(f"each domain needs at least 1 picture, found {source} and {target}")
    splits = fashion_mnist(folder, size=source + target)
    images, labels = splits.train.tensors

    def domain(images: Tensor, labels: Tensor) -> TensorDataset:
        return TensorDataset(smaller(change(images), side), labels)

    return Splits(
        domain(images[source:], labels[source:]),
        domain(*splits.validate.tensors),
        domain(*splits.test.tensors),
        CLASSES,
        f"fashion-mnist -> {name}",
        source=TensorDataset(smaller(images[:source], side), labels[:source]),
    )


def fashion_tasks(
    tasks: int = 6,
    classes: int = 4,
    overlap: int = 2,
    per_class: int = 150,
    seed: int = 0,
    renumber: bool = True,
    side: int = 28,
    folder: str | Path | None = None,
) -> Splits:
    """A stream of tasks; train, validate and test are lists, one data set per task.

    The ten classes stand in a circle in an order that the seed draws. Each task has the next few of it, the first
    `overlap` of which it shares with the task before. Training pictures are in one task only; validate and test have
    all pictures of the task's classes.

    Args:
        tasks: how many.
        classes: of each task.
        overlap: classes shared with the task before, fewer than `classes`.
        per_class: training pictures of each class in each task.
        seed: of the order of the classes.
        renumber: labels are a task's own, from 0 (a head for each task); False keeps the official ones (one head).
        side: pixels are averaged down to `side` x `side`: 28, 14 or 7.
        folder: as in :func:`~transfuse.datasets.fashion.fashion_mnist`.

    Raises:
        InputError: an argument is out of range, or a class has too few pictures for all its tasks.
        StoreError: the files cannot be read.
    """
    if tasks < 1 or not 0 <= overlap < classes <= len(CLASSES):
        raise InputError(
            f"tasks need 1 to {len(CLASSES)} classes with fewer overlapping, found tasks={tasks}, classes={classes}, "
            f"overlap={overlap}"
        )
    splits = fashion_mnist(folder)
    images, labels = splits.train.tensors
    circle = torch.randperm(len(CLASSES), generator=torch.Generator().manual_seed(seed)).tolist()
    unused = {label: torch.nonzero(labels == label)[:, 0] for label in circle}
    parts: dict[str, Any] = {"train": [], "validate": [], "test": []}
    for task in range(tasks):
        own = [circle[(task * (classes - overlap) + i) % len(CLASSES)] for i in range(classes)]
        taken = [unused[label][:per_class] for label in own]
        if short := [label for label, indices in zip(own, taken, strict=True) if len(indices) < per_class]:
            raise InputError(
                f"class {short[0]} has {int((labels == short[0]).sum())} training pictures, too few for {per_class} in "
                f"each of its tasks up to number {task}: lower per_class or tasks"
            )
        unused |= {label: unused[label][per_class:] for label in own}
        chosen = torch.cat(taken).sort().values
        found = Splits(TensorDataset(images[chosen], labels[chosen]), splits.validate, splits.test).only(own, renumber)
        for part, data in parts.items():
            inputs, targets = getattr(found, part).tensors
            data.append(TensorDataset(smaller(inputs, side), targets))
    name = f"fashion-mnist in {tasks} tasks of {classes} classes"
    return Splits(**parts, classes=None if renumber else CLASSES, name=name)


def fashion_discovery(
    known: Sequence[int] = (0, 1, 2, 3, 5),
    novel: Sequence[int] = (4, 6, 7, 8, 9),
    per_class: int = 200,
    seed: int = 0,
    side: int = 28,
    folder: str | Path | None = None,
) -> Splits:
    """Known classes with labels, and novel ones without; by default each novel class is close to a known one.

    Train is `labelled` and `unlabelled`, test is `old` and `new`. Labels count the known classes first, then the novel
    ones; those of `unlabelled` are there for measuring, and no method of discovery looks at them.

    Args:
        known, novel: which classes, each once.
        per_class: training pictures of each class.
        seed: which pictures those are.
        side: pixels are averaged down to `side` x `side`: 28, 14 or 7.
        folder: as in :func:`~transfuse.datasets.fashion.fashion_mnist`.

    Raises:
        InputError: a class stands twice, or has too few pictures.
        StoreError: the files cannot be read.
    """
    order = [*known, *novel]
    if len(set(order)) < len(order) or not known or not novel:
        raise InputError(f"known and novel classes must all differ, found {list(known)} and {list(novel)}")
    splits = fashion_mnist(folder).only(order)
    draw = torch.Generator().manual_seed(seed)

    def part(data: TensorDataset, numbers: range, count: int | None) -> TensorDataset:
        images, labels = data.tensors
        rows = [torch.nonzero(labels == n)[:, 0] for n in numbers]
        if count and (short := [n for n, own in zip(numbers, rows, strict=True) if len(own) < count]):
            raise InputError(f"class {order[short[0]]} has fewer than {count} training pictures: lower per_class")
        if count:
            rows = [own[torch.randperm(len(own), generator=draw)[:count]] for own in rows]
        chosen = torch.cat(rows)
        return TensorDataset(smaller(images[chosen], side), labels[chosen])

    old, new = range(len(known)), range(len(known), len(order))
    train = {"labelled": part(splits.train, old, per_class), "unlabelled": part(splits.train, new, per_class)}
    test = {"old": part(splits.test, old, None), "new": part(splits.test, new, None)}
    return Splits(train, None, test, tuple(CLASSES[c] for c in order), "fashion-mnist, known and novel classes")


def fashion_search(size: int = 4000, probe: int = 500, side: int = 14, folder: str | Path | None = None) -> Splits:
    """Fashion-MNIST for searching architectures: train is `train`, and `probe`, pictures that only score candidates.

    Args:
        size, probe: how many training pictures of each; no picture is in both.
        side: pixels are averaged down to `side` x `side`: 28, 14 or 7.
        folder: as in :func:`~transfuse.datasets.fashion.fashion_mnist`.

    Raises:
        InputError: there are fewer pictures.
        StoreError: the files cannot be read.
    """
    splits = fashion_mnist(folder, size=size + probe)
    images, labels = splits.train.tensors

    def reduced(images: Tensor, labels: Tensor) -> TensorDataset:
        return TensorDataset(smaller(images, side), labels)

    train = {"train": reduced(images[:size], labels[:size]), "probe": reduced(images[size:], labels[size:])}
    validate, test = (reduced(*part.tensors) for part in (splits.validate, splits.test))
    return Splits(train, validate, test, CLASSES, "fashion-mnist for search")


def fashion_clients(
    clients: int = 10,
    alpha: float = 0.3,
    size: int = 6000,
    fractions: Sequence[float] = (0.6, 0.0, 0.4),
    fewest: int = 20,
    seed: int = 0,
    side: int = 28,
    folder: str | Path | None = None,
) -> Splits:
    """Clients with private shards of skewed classes; train, validate and test are lists, one data set per client.

    The first `size` training pictures are dealt out by :func:`~transfuse.datasets.partition.dirichlet`; then each
    client's are split, so that it is tested on its own mix of classes.

    Args:
        clients: how many.
        alpha: concentration of the Dirichlet distribution; small is skewed.
        size: pictures of all clients together.
        fractions: train, validate and test of each client; 0 leaves validate out.
        fewest: pictures that each client has at least.
        seed: of the partition and of the splits.
        side: pixels are averaged down to `side` x `side`: 28, 14 or 7.
        folder: as in :func:`~transfuse.datasets.fashion.fashion_mnist`.

    Raises:
        InputError: an argument is out of range, or no partition leaves each client enough.
        StoreError: the files cannot be read.
    """
    images, labels = fashion_mnist(folder, size=size).train.tensors
    images = smaller(images, side)
    parts: dict[str, Any] = {"train": [], "validate": [], "test": []}
    for client, shard in enumerate(dirichlet(labels, clients, alpha, seed, fewest)):
        for data, indices in zip(parts.values(), stratified(labels[shard], fractions, seed + client), strict=True):
            data.append(TensorDataset(images[shard[indices]], labels[shard[indices]]))
    if fractions[1] == 0:
        parts.pop("validate")
    if fractions[2] == 0:
        parts.pop("test")
    return Splits(**parts, classes=CLASSES, name=f"fashion-mnist of {clients} clients (alpha {alpha:g})")

"""The trainer's step over a training loop written by hand that does the same arithmetic.

Both train a student by KD (temperature 4, weight 0.9, and the labels) with the same losses, the same fused
AdamW and the same cosine. What the trainer does on top (counts, checks, the learning curve, gradient norms every
200 updates) is what the ratio shows; setting up is not part of it.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.common import Result, no_garbage_collection
from transfuse.core.streams import as_data
from transfuse.core.trainer import Trainer
from transfuse.core.training import Training
from transfuse.datasets import byte_text
from transfuse.distill import KD
from transfuse.losses import cross_entropy, kl_divergence
from transfuse.losses.reduction import next_token
from transfuse.models import DecoderLM, SmallCNN

TURN = 10
"""Steps of one side before it is the other's turn."""
ROUND = 200
"""Steps of each side in one pair: the trainer takes gradient norms once in as many, so each pair has its share."""
TEMPERATURE, ALPHA, LR, WEIGHT_DECAY = 4.0, 0.9, 1e-3, 0.01

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From student logits, teacher logits and labels."""
Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""One epoch of inputs and labels."""


@dataclass(frozen=True)
class Case:
    """One comparison: the models, the trainer's data, and how a person would read the data and write the loss."""

    limit: float
    student: nn.Module
    teacher: nn.Module
    data: Any
    batch_size: int
    batches: Batches
    loss: Loss
    task: str = "classification"


def measure(repeats: int | None, smoke: bool) -> Result:
    """Compare every case, in `repeats` pairs each."""
    result = Result("step")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for label, make in CASES.items():
            torch.manual_seed(0)
            case = make()
            turn, round_, pairs = (1, 2, 1) if smoke else (TURN, ROUND, repeats or 6)
            result.add(label, case.limit, compare(case, turn, round_, pairs))
    finally:
        torch.set_num_threads(threads)
    return result


def compare(case: Case, turn: int, round_: int, pairs: int) -> list[tuple[float, float]]:
    """Seconds of processor time per step of the trainer and of the loop.

    The loop runs in the trainer's listener, so that they take turns within milliseconds and a machine that
    others use too slows both alike. Both compute in one thread and never wait, so processor time is what they
    take, without what others take in between. The first round warms up.
    """
    steps = round_ * (1 + pairs)
    loop = hand_written(case, deepcopy(case.student), steps)
    totals: list[tuple[float, float]] = []
    ours = theirs = 0.0
    since = time.process_time()

    def take_turns(trainer: Trainer, record: object) -> None:
        nonlocal ours, theirs, since
        if trainer.updates % turn:
            return
        stop = time.process_time()
        ours += stop - since
        for _ in range(turn):
            next(loop)
        theirs += time.process_time() - stop
        if trainer.updates % round_ == 0:
            totals.append((ours / round_, theirs / round_))
            ours = theirs = 0.0
            gc.collect()
        since = time.process_time()

    with no_garbage_collection():
        trainer_of(case, steps, listener=take_turns).fit()
    return totals[1:]


def trainer_of(case: Case, steps: int, **options: Any) -> Trainer:
    """Our side of the comparison."""
    return Trainer(
        KD(TEMPERATURE, ALPHA),
        {"target": deepcopy(case.student), "source": deepcopy(case.teacher)},
        {"data": as_data(case.data)},
        Training(steps=steps, batch_size=case.batch_size, lr=LR, weight_decay=WEIGHT_DECAY),
        task=case.task,
        **options,
    )


def hand_written(case: Case, student: nn.Module, steps: int) -> Iterator[None]:
    """The loop, which trains `student`; it yields after every step."""
    student, teacher = student.train(), deepcopy(case.teacher).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    order = itertools.chain.from_iterable(case.batches() for _ in itertools.count())
    for step, (inputs, labels) in zip(range(steps), order, strict=False):
        with torch.no_grad():
            taught = teacher(inputs)
        loss = case.loss(student(inputs), taught, labels)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        yield


# Cases ---------------------------------------------------------------------------------------------------------


def small_cnn() -> Case:
    """A step of less than 5 ms, where every call counts."""
    return _cnn(limit=1.15, size=8, batch_size=32)


def cnn() -> Case:
    """A step of 5 ms or more."""
    return _cnn(limit=1.05, size=16, batch_size=64)


def cnn_from_a_python_data_set() -> Case:
    """Samples read one by one: against a loop with a DataLoader in the same process."""
    samples, batch_size = _Samples(*_images(size=16)), 64
    loader = DataLoader(samples, batch_size, shuffle=True)
    return Case(1.10, SmallCNN(width=8), SmallCNN(), samples, batch_size, lambda: iter(loader), labelled_loss)


def language_model() -> Case:
    """Every token is taught, and scored on the next one."""
    (windows,), batch_size = byte_text(context=64).train[: 16 * 64], 8

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(windows)).split(batch_size):
            tokens = windows[rows]
            yield tokens, next_token(tokens)

    return Case(
        limit=1.05,
        student=DecoderLM(dim=32, depth=1, context=64),
        teacher=DecoderLM(dim=64, depth=2, context=64),
        data=TensorDataset(windows),
        batch_size=batch_size,
        batches=batches,
        loss=next_token_loss,
        task="language-model",
    )


CASES: dict[str, Callable[[], Case]] = {
    "small CNN, tensors": small_cnn,
    "CNN, tensors": cnn,
    "language model, tensors": language_model,
    "CNN, Python data set": cnn_from_a_python_data_set,
}


def labelled_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KD for `(batch, classes)`."""
    kd = kl_divergence(student, teacher, temperature=TEMPERATURE).mean()
    return ALPHA * kd + (1 - ALPHA) * cross_entropy(student, labels).mean()


def next_token_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KD for `(batch, tokens, vocabulary)`; the last position predicts nothing."""
    kd = kl_divergence(student, teacher, temperature=TEMPERATURE)[:, :-1].mean()
    return ALPHA * kd + (1 - ALPHA) * cross_entropy(student, labels)[:, :-1].mean()


def _cnn(limit: float, size: int, batch_size: int) -> Case:
    images, labels = _images(size)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(images)).split(batch_size):
            yield images[rows], labels[rows]

    data = TensorDataset(images, labels)
    return Case(limit, SmallCNN(width=8), SmallCNN(), data, batch_size, batches, labelled_loss)


def _images(size: int) -> tuple[Tensor, Tensor]:
    count = 16 * 64
    return torch.rand(count, 1, size, size), torch.randint(10, (count,))


class _Samples(Dataset[tuple[Tensor, int]]):
    """What a user writes for data of their own."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i], self.labels[i]

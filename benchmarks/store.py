"""A teacher store: what a step from it costs, what it takes on disk and in memory, and how fast it is built.

The student and the teacher are byte-fed decoders with an output layer of 49,152 classes, so that what scales with the
vocabulary is as it is in practice while the rest stays small.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Result, alternate, no_garbage_collection
from transfuse.core.store import Draws, TeacherStore
from transfuse.core.streams import as_data
from transfuse.core.trainer import Trainer
from transfuse.core.training import Training
from transfuse.distill import RSKD, Labels
from transfuse.models import DecoderLM

VOCABULARY, CONTEXT, BATCH, STEPS = 49152, 128, 8, 4


def measure(repeats: int | None = None, smoke: bool = False) -> Result:
    """Run every comparison."""
    repeats = repeats or (1 if smoke else 5)
    vocabulary = 512 if smoke else VOCABULARY
    result = Result("store")
    data = text(vocabulary, 32 if smoke else 64)
    # As SmolLM2-135M: drawing costs the same whatever the teacher's size, so a smaller one would be no fair measure.
    shape: Any = {"dim": 64, "depth": 2} if smoke else {"dim": 576, "depth": 30, "heads": 9}
    teacher = model(vocabulary, seed=1, **shape)
    with tempfile.TemporaryDirectory() as folder:
        store = TeacherStore.build(Path(folder) / "store", Sharp(vocabulary), data, Draws(50), batch_size=BATCH)
        assert store is not None
        ours, plain = step(RSKD(), store, data, vocabulary), dense_step(data, vocabulary)
        result.add("step from the store / plain cross-entropy step", 1.10, alternate(ours, plain, repeats))
        labels = step(Labels(), None, data, vocabulary)
        result.add("step from the store / our cross-entropy step", 1.25, alternate(ours, labels, repeats))
        tokens = data.numel()
        result.add("bytes per token / 50", 1.0, [(store.shards.size / tokens, 50.0)])

        first, others = building(teacher, data, Path(folder) / "again", repeats)
        result.add("a batch of a build / of the bare teacher", 1 / 0.95, others)
        result.add("the first, with what is read before / of the bare teacher", 2.0, first)
        few, many = (reading(Path(folder) / str(n), n, vocabulary) for n in ((16, 32) if smoke else (200, 2000)))
        result.add("memory of reading ten times the store", 1.1, [(many, few)])
    return result


def text(vocabulary: int, rows: int) -> Tensor:
    """Windows of tokens, drawn."""
    return torch.randint(vocabulary, (rows, CONTEXT), generator=torch.Generator().manual_seed(0))


def model(vocabulary: int, dim: int, depth: int, seed: int, heads: int = 4) -> DecoderLM:
    """A decoder that reads so many tokens."""
    torch.manual_seed(seed)
    return DecoderLM(vocabulary, dim=dim, depth=depth, heads=heads, context=CONTEXT)


class Sharp(torch.nn.Module):
    """A teacher whose distributions fall like those of a trained one, as 1 / rank squared: about 9 distinct of 50.

    Which class has which rank turns with the token that was read.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self.scores: Tensor
        self.register_buffer("scores", -2.0 * torch.arange(1.0, vocabulary + 1).log())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scores[(torch.arange(len(self.scores)) + 7919 * tokens[..., None]) % len(self.scores)]


def step(method: Any, source: Any, data: Tensor, vocabulary: int) -> Callable[[], float]:
    """Seconds of some updates by our trainer."""

    def run() -> float:
        roles = {"target": model(vocabulary, 256, 4, 0)} | ({} if source is None else {"source": source})
        training = Training(steps=STEPS, batch_size=BATCH, lr=1e-3)
        stamps: list[float] = []
        trainer = Trainer(
            method,
            roles,
            {"data": as_data(data)},
            training,
            task="language-model",
            listener=lambda *_: stamps.append(time.perf_counter()),
        )
        with no_garbage_collection():
            trainer.fit()
        return stamps[-1] - stamps[0]  # the first update also looks at gradients

    return run


def dense_step(data: Tensor, vocabulary: int) -> Callable[[], float]:
    """Seconds of as many updates of a loop by hand, with dense logits."""

    def run() -> float:
        student = model(vocabulary, 256, 4, 0)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
        stamps = []
        with no_garbage_collection():
            for rows in torch.randperm(len(data)).split(BATCH)[:STEPS]:
                logits = student(data[rows])
                F.cross_entropy(logits[:, :-1].flatten(0, 1), data[rows][:, 1:].flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()
                stamps.append(time.perf_counter())
        return stamps[-1] - stamps[0]

    return run


Pairs = list[tuple[float, float]]


def building(teacher: torch.nn.Module, data: Tensor, folder: Path, builds: int) -> tuple[Pairs, Pairs]:
    """Seconds of every batch of some builds, and of the bare teacher right after it: of first ones, and of others.

    In turns by batch, for a machine that others share changes its pace within a build.
    """
    first: Pairs = []
    others: Pairs = []
    for _ in range(builds):
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()

        @torch.no_grad()
        def told(done: int, total: int) -> None:
            nonlocal began
            ours, asked = time.perf_counter() - began, time.perf_counter()
            teacher(data[done - BATCH : done])
            (others if done > BATCH else first).append((ours, time.perf_counter() - asked))
            began = time.perf_counter()

        given: Any = {"batch_size": BATCH, "say": lambda text: None, "progress": told}
        with no_garbage_collection():
            TeacherStore.build(folder, teacher, data, Draws(50), **given)
    return first, others


PROBE = """
import re, sys, torch
from pathlib import Path
from benchmarks.store import CONTEXT, text
from transfuse.core.store import TeacherStore
from transfuse.core.streams import as_data
rows, vocabulary = int(sys.argv[2]), int(sys.argv[3])
data = as_data(text(vocabulary, rows))
store = TeacherStore(Path(sys.argv[1]))
for some in torch.arange(rows).split(8):
    store.read(data.fetch(some))
print(int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024)
"""


def reading(folder: Path, rows: int, vocabulary: int) -> float:
    """Megabytes of a process that has read a whole store, without the pages of the file, which are the system's."""
    torch.manual_seed(0)
    small = model(vocabulary, 8, 1, 2)
    TeacherStore.build(folder, small, text(vocabulary, rows), Draws(20), batch_size=BATCH, say=lambda text: None)
    given = [sys.executable, "-c", PROBE, str(folder), str(rows), str(vocabulary)]
    return float(subprocess.check_output(given, text=True))

"""Python's source code, a small encoder of words, and a bank of adapters on it: what proofs of the bank share."""

from __future__ import annotations

import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transfuse import transfer
from transfuse.core.errors import InputError
from transfuse.core.method import Method
from transfuse.datasets.text import MODULES
from transfuse.distill import Labels
from transfuse.models.transformer import Block
from transfuse.weights import BottleneckAdapter

WORDS, LENGTH, DIM, DEPTH = 2000, 16, 64, 3
PAD, UNKNOWN, MASK = 0, 1, 2
NEXT = ("self", "if", "def", "return", "for", "raise", "else", "try")
"""Classes of a source task: the word that the line after the window begins with."""
PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "urllib", "wsgiref", "xml")
"""Classes of the target task; no source task has seen a file of theirs."""
ADAPTER = BottleneckAdapter("blocks.*.mlp", reduction=8)
TRAINING: dict[str, Any] = {"batch_size": 32, "optimizer": "adamw", "lr": 3e-3, "task": "classification"}
ALONE: dict[str, Any] = {"lr": 1e-2}
"""For an adapter of the target alone; of 1e-3, 3e-3 and 1e-2 the best on the validation windows with another seed."""
Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Window:
    """LENGTH words of one file that follow one another, and where they stand.

    Attributes:
        module: of the file, or its package.
        words: of the window.
        depth: of the first line's indentation, in steps of 4.
        prose: whether the first line is a comment, or in a string in three quotes that goes on after it.
        after: the first word of the line after the window.
    """

    module: str
    words: tuple[str, ...]
    depth: int
    prose: bool
    after: str


class Encoder(nn.Module):
    """Words to classes: embeddings, pre-norm blocks that see all real words, their average, a linear head.

    Args:
        classes: of the head.
        each: whether every word has logits of its own, as for pre-training.
    """

    def __init__(self, classes: int, each: bool = False):
        super().__init__()
        self.each = each
        self.embed, self.places = nn.Embedding(WORDS, DIM), nn.Embedding(LENGTH, DIM)
        for table in (self.embed, self.places):
            nn.init.normal_(table.weight, std=0.1)
        self.blocks = nn.ModuleList(Block(DIM, 4) for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        real = attention_mask.bool()
        x = self.embed(input_ids) + self.places.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x, real[:, None, None, :])
        x = self.norm(x)
        if not self.each:
            x = (x * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
        out: Tensor = self.head(x)
        return out


@cache
def source_windows() -> list[Window]:
    """Of the standard library's modules that are one file each."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [w for module in MODULES for w in _windows(folder / f"{module}.py", module)]


@cache
def target_windows() -> tuple[list[Window], list[Window]]:
    """Of packages, by turns: to learn from, and to test on; 150 of each package in either, spread over its files."""
    learn: list[Window] = []
    test: list[Window] = []
    for package in PACKAGES:
        files = sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py"))
        found = [w for file in files for w in _windows(file, package)]
        for part, windows in ((learn, found[::2]), (test, found[1::2])):
            part.extend(windows[:: len(windows) // 150][:150])
    return learn, test


@cache
def vocabulary() -> dict[str, int]:
    counts = Counter(word for w in source_windows() for word in w.words)
    return {word: i + 3 for i, (word, _) in enumerate(counts.most_common(WORDS - 3))}


def rows(windows: list[Window], labels: list[int] | None = None) -> Rows:
    """Word numbers `(windows, LENGTH)` and labels."""
    known = vocabulary()
    tokens = torch.tensor([[known.get(word, UNKNOWN) for word in w.words] for w in windows])
    found = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return found if labels is None else {**found, "labels": torch.tensor(labels)}


@cache
def sources() -> dict[str, Rows]:
    """The six source tasks, at most 3,000 windows each."""
    tasks: dict[str, Callable[[Window], int | None]] = {
        **{f"module {i}": _one_of(MODULES[i::3], "module") for i in range(3)},
        "next line": _one_of(NEXT, "after"),
        "prose": lambda w: int(w.prose),
        "depth": lambda w: min(w.depth, 3),
    }
    found = {}
    for name, label in tasks.items():
        labelled = [(w, y) for w in source_windows() if (y := label(w)) is not None]
        found[name] = _shuffled(labelled, 3000, name)
    return found


@cache
def targets() -> tuple[Rows, Rows]:
    """The target task in a fixed random order, as many windows of every package: to learn from, and to test on."""
    learn, test = ([(w, PACKAGES.index(w.module)) for w in part] for part in target_windows())
    return _shuffled(learn, 10**6, "learn"), _shuffled(test, 10**6, "test")


def parts(labels: int, seed: int, validate: bool = False) -> tuple[Rows, Rows]:
    """`labels` samples to learn from, drawn by the seed, and 600 others to test on (or 300 to choose settings by)."""
    whole, test = targets()
    order = torch.randperm(len(whole["labels"]), generator=torch.Generator().manual_seed(1000 + seed))
    held = torch.arange(300) if validate else torch.arange(300, 900)
    return {k: v[order[:labels]] for k, v in whole.items()}, {k: v[held] for k, v in test.items()}


@cache
def backbone(smoke: bool = False) -> nn.Module:
    """The encoder, trained to say which words were masked in windows of the source modules."""
    given = rows(source_windows()[: 500 if smoke else None])
    draw = torch.Generator().manual_seed(0)
    real = given["attention_mask"].bool()
    hidden = real & (torch.rand(real.shape, generator=draw) < 0.2)
    data = {
        **given,
        "input_ids": given["input_ids"].masked_fill(hidden, MASK),
        "labels": given["input_ids"].masked_fill(~hidden, -100),
    }
    data = {k: v[hidden.any(1)] for k, v in data.items()}
    torch.manual_seed(0)
    length = {"steps": 3 if smoke else 2500, "batch_size": 64, "lr": 3e-3, "warmup": 50, "clip": 1.0}
    return transfer(Labels(), None, Encoder(WORDS, each=True), data, task="token-classification", **length).model


def fresh(classes: int, seed: int, smoke: bool = False) -> Encoder:
    """The backbone with a new head."""
    torch.manual_seed(seed)
    model = Encoder(classes)
    state = {k: v for k, v in backbone(smoke).state_dict().items() if not k.startswith("head.")}
    model.load_state_dict({**model.state_dict(), **state})
    return model


@cache
def bank(smoke: bool = False, shuffled: bool = False) -> dict[str, nn.Module]:
    """An adapter for every source task; with `shuffled`, from labels of other windows."""
    found = {}
    for name, data in list(sources().items())[: 2 if smoke else None]:
        if shuffled:
            order = torch.randperm(len(data["labels"]), generator=torch.Generator().manual_seed(0))
            data = {**data, "labels": data["labels"][order]}
        start = fresh(int(data["labels"].max()) + 1, 0, smoke)
        found[name] = transfer(ADAPTER, None, start, data, **{**TRAINING, "steps": 3 if smoke else 400}).model
    return found


def accuracy(
    method: Method, given: Any, train: Rows, test: Rows, seed: int, smoke: bool, **training: Any
) -> tuple[float, nn.Module, list[dict[str, Any]]]:
    """Accuracy of what a method makes of the backbone, the model, and its panels."""
    settings = {**TRAINING, "steps": 3 if smoke else 300, **training}
    start = fresh(len(PACKAGES), seed, smoke)
    test = {k: v[:64] for k, v in test.items()} if smoke else test
    result = transfer(method, given, start, train, test=test, seeds=[seed], **settings)
    run = result.arms[0].runs[0]
    return float(result.arms[0].evaluations[0].metrics["accuracy"]), result.model, list(run.panels)


def _windows(file: Path, module: str) -> list[Window]:
    """Windows of a file that do not overlap.

    Raises:
        InputError: this Python has no such file.
    """
    if not file.is_file():
        raise InputError(f"{file} is a file of Python's standard library, found none")
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = text.expandtabs().split("\n")
    quotes = list(accumulate(line.count('"""') for line in lines))
    words = [(word, n) for n, line in enumerate(lines) for word in _words(line)]
    firsts = {n: found[0] for n, line in enumerate(lines) if (found := _words(line))}
    windows = []
    for start in range(0, len(words) - LENGTH + 1, LENGTH):
        taken = words[start : start + LENGTH]
        first, last = taken[0][1], taken[-1][1]
        depth = (len(lines[first]) - len(lines[first].lstrip())) // 4
        after = firsts.get(last + 1, "")
        windows.append(
            Window(
                module,
                tuple(word for word, _ in taken),
                depth,
                lines[first].lstrip().startswith("#") or quotes[first] % 2 == 1,
                after,
            )
        )
    return windows


def _words(line: str) -> list[str]:
    return re.findall(r"[a-z]+", line.lower())


def _one_of(values: tuple[str, ...], field: str) -> Callable[[Window], int | None]:
    return lambda w: values.index(getattr(w, field)) if getattr(w, field) in values else None


def _shuffled(chosen: list[tuple[Window, int]], size: int, purpose: str) -> Rows:
    draw = torch.Generator().manual_seed(zlib.crc32(purpose.encode()))
    picked = [chosen[i] for i in torch.randperm(len(chosen), generator=draw).tolist()[:size]]
    return rows([w for w, _ in picked], [label for _, label in picked])

"""Package descriptions, a small encoder of words, and a bank of adapters on it: what proofs of the bank share."""

from __future__ import annotations

import re
import subprocess
import zlib
from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from transfuse import transfer
from transfuse.core.errors import InputError
from transfuse.core.method import Method
from transfuse.distill import Labels
from transfuse.models.transformer import Block
from transfuse.weights import BottleneckAdapter

READ = ("Package", "Source", "Section", "Description:", "Tag")
WORDS, LENGTH, DIM, DEPTH = 4000, 12, 64, 3
PAD, UNKNOWN, MASK = 0, 1, 2
FIELDS = {
    "role": ("program", "shared-lib", "devel-lib", "documentation", "app-data", "plugin"),
    "implemented-in": ("perl", "c", "c++", "python", "java", "lisp"),
    "interface": ("x11", "commandline", "daemon", "text-mode"),
    "works-with": ("text", "audio", "image", "mail", "file", "db"),
    "use": ("gameplaying", "converting", "editing", "checking", "viewing", "monitor"),
}
"""Source tasks: which of these tags a package has, where it has exactly one."""
LIBRARIES = ("libs", "libdevel", "python", "perl", "doc", "devel", "haskell", "javascript", "java", "ruby")
"""Sections of the sixth source task."""
SECTIONS = ("net", "admin", "science", "games", "sound", "graphics", "web", "text")
"""Classes of the target task, which no source task has."""
ADAPTER = BottleneckAdapter("blocks.*.mlp", reduction=8)
TRAINING: dict[str, Any] = {"batch_size": 32, "optimizer": "adamw", "lr": 3e-3, "task": "classification"}
Rows = dict[str, Tensor]


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
def packages() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Descriptions with section and tags: for sources, and for the target; no source package is in both.

    Raises:
        InputError: this machine knows of no packages.
    """
    try:
        text = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, check=True).stdout.decode(
            errors="replace"
        )
    except (OSError, subprocess.CalledProcessError):
        text = ""
    found: dict[str, dict[str, str]] = {}
    for entry in text.split("\n\n"):
        lines = entry.replace("\n ", " ").split("\n")
        fields = dict(line.split(": ", 1) for line in lines if line.startswith(READ) and ": " in line)
        if "Description" in fields and "Section" in fields:
            fields["family"] = fields.get("Source", fields["Package"]).split()[0]
            found.setdefault(fields["Description"], fields)
    if len(found) < 20_000:
        raise InputError(f"apt-cache knows {len(found)} packages, 20,000 are needed: run `apt-get update` on Debian")
    held = [zlib.crc32(p["family"].encode()) % 5 == 0 for p in found.values()]
    entries = list(found.values())
    return [p for p, h in zip(entries, held, strict=True) if not h], [
        p for p, h in zip(entries, held, strict=True) if h
    ]


@cache
def vocabulary() -> dict[str, int]:
    counts = Counter(word for p in packages()[0] for word in _words(p))
    return {word: i + 3 for i, (word, _) in enumerate(counts.most_common(WORDS - 3))}


def rows(entries: list[dict[str, str]], labels: list[int] | None = None) -> Rows:
    """Word numbers `(packages, LENGTH)`, padded, and labels."""
    known = vocabulary()
    tokens = torch.zeros(len(entries), LENGTH, dtype=torch.long)
    for i, entry in enumerate(entries):
        words = [known.get(word, UNKNOWN) for word in _words(entry)][:LENGTH] or [UNKNOWN]
        tokens[i, : len(words)] = torch.tensor(words)
    found = {"input_ids": tokens, "attention_mask": (tokens != PAD).long()}
    return found if labels is None else {**found, "labels": torch.tensor(labels)}


@cache
def sources() -> dict[str, Rows]:
    """The source tasks, at most 4,000 packages each."""
    entries, found = packages()[0], {}
    for field, values in FIELDS.items():
        tags = [set(re.findall(rf"{field}::([\w+-]+)", p.get("Tag", ""))) & set(values) for p in entries]
        chosen = [(p, values.index(min(t))) for p, t in zip(entries, tags, strict=True) if len(t) == 1]
        found[field] = _shuffled(chosen, 4000, field)
    chosen = [(p, LIBRARIES.index(p["Section"])) for p in entries if p["Section"] in LIBRARIES]
    found["library"] = _shuffled(chosen, 4000, "library")
    return found


@cache
def target() -> Rows:
    """The target task, in a fixed random order."""
    return _shuffled([(p, SECTIONS.index(p["Section"])) for p in packages()[1] if p["Section"] in SECTIONS], 10**6, "t")


def parts(labels: int, seed: int, validate: bool = False) -> tuple[Rows, Rows]:
    """`labels` samples to learn from, drawn by the seed, and 600 others to test on (or 300 to choose settings by)."""
    whole = target()
    count = len(whole["labels"])
    order = torch.randperm(count - 900, generator=torch.Generator().manual_seed(1000 + seed)) + 900
    held = torch.arange(300) if validate else torch.arange(300, 900)
    return {k: v[order[:labels]] for k, v in whole.items()}, {k: v[held] for k, v in whole.items()}


@cache
def backbone(smoke: bool = False) -> nn.Module:
    """The encoder, trained to say which words were masked in descriptions of the source packages."""
    given = rows(packages()[0][: 500 if smoke else None])
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
    length = {"steps": 3 if smoke else 700, "batch_size": 128, "lr": 3e-3, "warmup": 50, "clip": 1.0}
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
    """An adapter for every source task; with `shuffled`, from labels of other packages."""
    found = {}
    for name, data in list(sources().items())[: 2 if smoke else None]:
        if shuffled:
            order = torch.randperm(len(data["labels"]), generator=torch.Generator().manual_seed(0))
            data = {**data, "labels": data["labels"][order]}
        start = fresh(int(data["labels"].max()) + 1, 0, smoke)
        found[name] = transfer(ADAPTER, None, start, data, **{**TRAINING, "steps": 3 if smoke else 250}).model
    return found


def accuracy(
    method: Method, given: Any, train: Rows, test: Rows, seed: int, smoke: bool, **training: Any
) -> tuple[float, nn.Module, list[dict[str, Any]]]:
    """Accuracy of what a method makes of the backbone, the model, and its panels."""
    settings = {**TRAINING, "steps": 3 if smoke else 150, **training}
    start = fresh(len(SECTIONS), seed, smoke)
    test = {k: v[:64] for k, v in test.items()} if smoke else test
    result = transfer(method, given, start, train, test=test, seeds=[seed], **settings)
    run = result.arms[0].runs[0]
    return float(result.arms[0].evaluations[0].metrics["accuracy"]), result.model, list(run.panels)


def _words(entry: dict[str, str]) -> list[str]:
    return re.findall(r"[a-z]+", entry["Description"].lower())


def _shuffled(chosen: list[tuple[dict[str, str], int]], size: int, purpose: str) -> Rows:
    draw = torch.Generator().manual_seed(zlib.crc32(purpose.encode()))
    picked = [chosen[i] for i in torch.randperm(len(chosen), generator=draw).tolist()[:size]]
    return rows([p for p, _ in picked], [label for _, label in picked])

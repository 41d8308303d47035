"""The least that methods of language models run on, and what their losses are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from helpers import Example, language_model, ragged_tokens

from transfuse.core.method import Method
from transfuse.core.store.forms import draw_tokens
from transfuse.distill import DPKD, GKD, RSKD, DistiLLM, MiniLLM, SelfEvolution, SeqKD, Swing


def text_example(method: Method, **options: Any) -> Example:
    given = {"steps": 6, "batch_size": 4, "lr": 1e-2, "task": "language-model", **options}
    data = ragged_tokens(16)
    return Example(method, language_model(0), language_model(1, dim=12), data, ragged_tokens(6, seed=1), given)


def private_example() -> Example:
    """Every third token is private."""
    found = text_example(Swing())
    for rows in (found.data, found.test):
        private = (torch.arange(rows["input_ids"].shape[1]) % 3 == 1).float().expand(rows["input_ids"].shape)
        rows["inputs"] = {name: rows.pop(name) for name in ("input_ids", "attention_mask")}
        rows["privacy"] = private.clone()
    return found


EXAMPLES: dict[str, Callable[[], Example]] = {
    "RSKD": lambda: text_example(RSKD(draws=20, alpha=0.5)),
    "SelfEvolution": lambda: text_example(SelfEvolution(labels=0.1)),
    "DPKD": lambda: text_example(DPKD()),
    "Swing": lambda: private_example(),
    "GKD": lambda: text_example(GKD(prompt=2, end=3)),
    "DistiLLM": lambda: text_example(
        DistiLLM(prompt=2, end=3, start=0.7, every=2, held_out=4, capacity=9, margin=-1.0)
    ),
    "MiniLLM": lambda: text_example(MiniLLM(prompt=2, end=3)),
    "SeqKD": lambda: text_example(SeqKD(prompt=2, end=3, writes=5, temperature=1.0)),
}


def log_softmax(row: np.ndarray) -> list[float]:
    total = math.log(sum(math.exp(z - max(row)) for z in row)) + max(row)
    return [z - total for z in row]


def rskd(method: RSKD, s: np.ndarray, t: np.ndarray, *_: Any) -> float:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    total = 0.0
    for student, row in zip(s, draw_tokens(torch.tensor(t).float(), method.draws, draw).tolist(), strict=True):
        log_p = log_softmax(student)
        for token in set(row):
            share = row.count(token) / method.draws
            total += share * (math.log(share) - log_p[token])
    return total / len(s)


def self_evolution(method: SelfEvolution, s: np.ndarray, t: np.ndarray, labels: list[int], *_: Any) -> float:
    rows = []
    for student, teacher, label in zip(s, t, labels, strict=True):
        p = [math.exp(z) for z in log_softmax(student)]
        q = [(1 - method.blend) * math.exp(z) for z in log_softmax(teacher)]
        q[label] += method.blend
        rows.append((p, q, sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))))
    mean = sum(d for _, _, d in rows) / len(rows)
    total = 0.0
    for p, q, d in rows:
        g = method.most * (1 - math.exp(-d)) if d > mean else 0.0
        total += sum(b * math.log(b / ((1 - g) * a + g * b)) for a, b in zip(p, q, strict=True))
    return total / len(rows)


def dpkd(method: DPKD, s: np.ndarray, t: np.ndarray, labels: list[int], *_: Any) -> float:
    total = 0.0
    for student, teacher, label in zip(map(log_softmax, s), map(log_softmax, t), labels, strict=True):
        a, c = teacher.index(max(teacher)), student.index(max(student))
        h = (student[a] - student[c]) - (teacher[a] - teacher[c])
        total += method.alpha * math.log(1 + math.exp(-method.beta * h)) - (1 - method.alpha) * student[label]
    return total / len(s)


FORMULAS = {RSKD: rskd, SelfEvolution: self_evolution, DPKD: dpkd}
NOT_ZERO = {
    RSKD: "what is drawn is not the distribution it is drawn from",
    SelfEvolution: "the target holds labels",
    DPKD: "log 2 is the least that a preference costs",
}
COUPLED = {
    RSKD: "draws come in the order of the micro-batches",
    SelfEvolution: "what is hard is told by the mean over a micro-batch",
}

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
from transfuse.distill import RSKD


def text_example(method: Method, **options: Any) -> Example:
    given = {"steps": 6, "batch_size": 4, "lr": 1e-2, "task": "language-model", **options}
    data = ragged_tokens(16)
    return Example(method, language_model(0), language_model(1, dim=12), data, ragged_tokens(6, seed=1), given)


EXAMPLES: dict[str, Callable[[], Example]] = {
    "RSKD": lambda: text_example(RSKD(draws=20, alpha=0.5)),
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


FORMULAS = {RSKD: rskd}
NOT_ZERO = {RSKD: "what is drawn is not the distribution it is drawn from"}
COUPLED = {RSKD: "draws come in the order of the micro-batches"}

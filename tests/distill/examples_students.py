"""The least that students with other token mixers run on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers import Example, language_model, ragged_tokens

from transfuse.distill import Subquadratic
from transfuse.models import subquadratic_student


def student_example() -> Example:
    teacher = language_model(1, depth=2)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        student = subquadratic_student(teacher, "gla")
    options = {"steps": 9, "batch_size": 4, "clip": 1.0, "task": "language-model"}
    method = Subquadratic(shares=(0.3, 0.3, 0.4))
    return Example(method, student, teacher, ragged_tokens(24), ragged_tokens(6, seed=1), options)


EXAMPLES: dict[str, Callable[[], Example]] = {"Subquadratic": student_example}

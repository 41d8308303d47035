"""FineTune: one task after the other and nothing else, the control of every continual learner."""

from __future__ import annotations

from transfuse.continual.base import Learner
from transfuse.core.card import Card


class FineTune(Learner):
    """Train on every task as it comes, and remember nothing.

        loss = CE(labels, target) on the task at hand

    What a method forgets less than this, it has kept.

    Args:
        heads: `"task"` for a head per task, `"shared"` for the target's own head.
    """

    card = Card(paper="sequential fine-tuning", carries="nothing", teacher="tasks", data="labelled", control=True)

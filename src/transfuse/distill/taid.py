"""TAID: distillation towards a target that moves from the student to the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses, Phase
from transfuse.core.run import Run
from transfuse.core.teacher import same_classes
from transfuse.core.teaching import teach
from transfuse.distill.base import Distillation
from transfuse.losses import Divergence


class TAID(Distillation):
    """Distil towards a target between student and teacher, which moves to the teacher as fast as the loss falls.

        target = softmax((1 - t) * student + t * teacher)    in logits; the student's part is a constant
        loss = (1 - alpha) * CE(labels, student) + alpha * CE(target, student)

    After each update, with `l` the loss of that update and `prev` the one before it:

        momentum_t = momentum * momentum_t + (1 - momentum) * (prev - l) / prev
        t = min(end, max(linear, t + rate * sigmoid(momentum_t) * (1 - t)))

    where `linear` goes from `start` to `end` over the stage. So t never lags behind the linear schedule, and runs
    ahead of it while the loss falls. The first update has nothing to compare with, and t follows `linear`. It counts
    updates, not micro-batches, and stands still while the model is only validated.

    Args:
        start: t at the beginning, in [0, 1). The authors use 0.4 and 0.2.
        end: t is at most this, in (start, 1].
        rate: of the adaptive steps; 0 is the linear schedule alone.
        momentum: of the smoothed relative change of the loss, in [0, 1).
        alpha: weight of the target, in [0, 1]; 1 uses no labels.

    Raises:
        InputError: an argument is out of its range.
        VocabularyError: teacher and student count different classes.

    Source: Shing, Misaki, Bao, Yokoi & Akiba, ICLR 2025, arXiv:2501.16937.
    """

    card = Card(
        paper="Shing, Misaki, Bao, Yokoi & Akiba, ICLR 2025",
        arxiv="2501.16937",
        sheet=12,
        carries="outputs",
        teacher="full",
        data="unlabelled",
        tasks=("classification", "language-model", "token-classification", "segmentation"),
    )

    def __init__(
        self, start: float = 0.4, end: float = 1.0, rate: float = 5e-4, momentum: float = 0.99, alpha: float = 1.0
    ):
        super().__init__()
        if not 0 <= start < end <= 1:
            raise InputError(f"TAID: start and end are {start} and {end}: 0 <= start < end <= 1 is needed")
        if rate < 0 or not 0 <= momentum < 1:
            raise InputError(f"TAID: rate is {rate}, it must not be negative; momentum is {momentum}, it is in [0, 1)")
        if not 0 <= alpha <= 1:
            raise InputError(f"TAID: alpha is {alpha}, it must be between 0 (labels only) and 1 (teacher only)")
        self.start, self.end, self.rate, self.momentum, self.alpha = start, end, rate, momentum, alpha
        self.position: Tensor
        self.trend: Tensor
        self.previous: Tensor
        self.seen: Tensor
        self.register_buffer("position", torch.tensor(float(start)))
        self.register_buffer("trend", torch.tensor(0.0))
        self.register_buffer("previous", torch.tensor(0.0))
        self.register_buffer("seen", torch.tensor(False))

    def build(self, student: Outputs, teacher: Outputs) -> None:
        same_classes(student.scores, teacher.scores)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        target = Divergence("interpolated", float(self.position))
        return teach("taid", target, student, teacher, batch, self.alpha)

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        done = (run.clock.step + 1) / run.clock.steps
        step = torch.zeros_like(self.position)
        if "taid" in values:
            loss = values["taid"].detach().to(self.previous)
            change = (self.previous - loss) / (self.previous + 1e-15)
            trend = self.momentum * self.trend + (1 - self.momentum) * change
            self.trend.copy_(torch.where(self.seen, trend, self.trend))
            step = torch.where(self.seen, self.rate * self.trend.sigmoid() * (1 - self.position), step)
            self.previous.copy_(loss)
            self.seen.fill_(True)
        linear = self.start + (self.end - self.start) * done
        self.position.copy_((self.position + step).clamp(min=linear).clamp(max=self.end))

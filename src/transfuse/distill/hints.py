"""Hints: the student's inner layer learns to predict the teacher's (FitNets)."""

from __future__ import annotations

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.core.projector import Projector
from transfuse.distill.base import Distillation
from transfuse.losses import Term, mean_squared_error


class Hints(Distillation):
    """Regress the teacher's features from the student's, through a learned projector.

        loss = mean squared error(projector(student feature), teacher feature), per sample

    Token features under a mask count scored tokens only. The projector maps channels, width, pixels and token
    counts where they differ, is trained along, and is gone from the deployed student.

    The paper trains in two stages, hints first and distillation after: `Then(Hints("a", "b"), KD())`. As a term
    beside others it is `KD() + 0.5 * Hints("a", "b")`. Alone it teaches the layers up to the tap, not the head.

    Args:
        student: tap of the guided layer, for instance `"layer2"`.
        teacher: tap of the hint layer.

    Raises:
        LayerError: a tap fits no layer, or several.
        ShapeError: no projector leads from one shape to the other.

    Source: Romero et al., ICLR 2015, arXiv:1412.6550.
    """

    card = Card(
        paper="Romero et al. (FitNets), ICLR 2015",
        arxiv="1412.6550",
        carries="features",
        teacher="features",
        data="unlabelled",
        tasks=("classification", "language-model", "token-classification", "segmentation"),
    )

    def __init__(self, student: str, teacher: str):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.projector: Projector | None = None

    def wants(self) -> dict[str, list[str]]:
        return {"target": [self.student], "source": [self.teacher]}

    def build(self, student: Outputs, teacher: Outputs) -> None:
        self.projector = Projector(student.features[self.student], teacher.features[self.teacher])

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        assert self.projector is not None
        hint = teacher.features[self.teacher]
        guided = self.projector(student.features[self.student], hint)
        if batch.mask is not None and hint.dim() == 3 and hint.shape[:-1] == batch.mask.shape:
            tokens = mean_squared_error(guided.flatten(0, 1), hint.flatten(0, 1)).view_as(batch.mask)
            return {"hints": Term.of(tokens, batch.mask)}
        return {"hints": Term.of(mean_squared_error(guided, hint))}

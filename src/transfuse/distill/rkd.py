"""RKD: the student learns the relations among samples."""

from __future__ import annotations

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.distill.base import Distillation
from transfuse.losses import Term, rkd_angle, rkd_distance


class RKD(Distillation):
    """Match distances between pairs and angles within triplets of embeddings.

        loss = distance * Huber(d_student / mean d_student, d_teacher / mean d_teacher) + angle * Huber(cos, cos)

    Both are batch-coupled: their value depends on which samples share a micro-batch. Widths may differ.
    Relations alone teach no head: add a method that does, `KD() + RKD()`.

    Args:
        student, teacher: taps of embeddings; by default the input of the last linear layer.
        distance, angle: weights, the paper's for classification; 0 leaves a part out.

    Raises:
        LayerError: a tap fits no layer, or several, or there is no last linear layer.

    Source: Park et al., CVPR 2019, arXiv:1904.05068.
    """

    card = Card(
        paper="Park et al., CVPR 2019",
        arxiv="1904.05068",
        carries="relations",
        teacher="features",
        data="unlabelled",
        tasks=("classification",),
    )

    def __init__(
        self, student: str = "penultimate", teacher: str = "penultimate", distance: float = 25.0, angle: float = 50.0
    ):
        super().__init__()
        self.student, self.teacher, self.distance, self.angle = student, teacher, distance, angle

    def wants(self) -> dict[str, list[str]]:
        return {"target": [self.student], "source": [self.teacher]}

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        ours, theirs = student.features[self.student], teacher.features[self.teacher]
        terms = {}
        if self.distance:
            terms["distance"] = self.distance * Term(rkd_distance(ours, theirs))
        if self.angle:
            terms["angle"] = self.angle * Term(rkd_angle(ours, theirs))
        return terms

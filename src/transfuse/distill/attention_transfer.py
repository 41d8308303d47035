"""AttentionTransfer: the student looks where the teacher looks."""

from __future__ import annotations

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.core.projector import resize_map
from transfuse.distill.base import Distillation
from transfuse.losses import Term, attention_transfer


class AttentionTransfer(Distillation):
    """Match normalised spatial attention maps, the mean over channels of the squared activations.

        loss = beta / (2 * height * width) * || Q_student / |Q_student| - Q_teacher / |Q_teacher| ||_2, per sample

    Channels may differ; where the maps differ in size, the student's feature is brought to the teacher's.
    Attention alone teaches no head: add it to a method that does, `KD() + AttentionTransfer("layer2", "layer2")`.

    Args:
        student, teacher: taps of features `(batch, channels, height, width)`.
        beta: weight; the paper's 1000 is divided by the number of pixels of the map.

    Raises:
        LayerError: a tap fits no layer, or several.
        ShapeError: a tapped feature is no map.

    Source: Zagoruyko & Komodakis, ICLR 2017, arXiv:1612.03928, equation 2.
    """

    card = Card(
        paper="Zagoruyko & Komodakis, ICLR 2017",
        arxiv="1612.03928",
        carries="attention",
        teacher="features",
        data="unlabelled",
        tasks=("classification", "segmentation"),
    )

    def __init__(self, student: str, teacher: str, beta: float = 1000.0):
        super().__init__()
        self.student, self.teacher, self.beta = student, teacher, beta

    def wants(self) -> dict[str, list[str]]:
        return {"target": [self.student], "source": [self.teacher]}

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        ours, theirs = student.features[self.student], teacher.features[self.teacher]
        if ours.dim() == theirs.dim() == 4:
            ours = resize_map(ours, (theirs.shape[-2], theirs.shape[-1]))
        distance = Term.of(attention_transfer(ours, theirs))
        return {"attention": self.beta / (2 * theirs[0, 0].numel()) * distance}

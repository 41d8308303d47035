"""KD: knowledge distillation on softened logits."""

from __future__ import annotations

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.core.teacher import same_classes
from transfuse.core.teaching import teach
from transfuse.distill.base import Distillation
from transfuse.losses import Divergence


class KD(Distillation):
    """Match the teacher's softened class probabilities, and the labels where there are any.

        loss = (1 - alpha) * CE(labels, student) + alpha * T**2 * KL(softmax(teacher / T) || softmax(student / T))

    Each part is a mean over what it counts: labelled samples (or positions), and all samples (or scored
    positions). The factor T**2 keeps the size of the gradient independent of T. Samples without a label
    (label -100, or no labels at all) are taught by the teacher alone.

    Args:
        temperature: T > 0; the higher, the more the small probabilities count.
        alpha: weight of the teacher, in [0, 1]; 1 uses no labels.

    Raises:
        VocabularyError: teacher and student count different classes.

    Source: Hinton, Vinyals & Dean, 2015, arXiv:1503.02531.
    """

    card = Card(
        paper="Hinton, Vinyals & Dean, NeurIPS workshop 2015",
        arxiv="1503.02531",
        carries="outputs",
        teacher="full",
        also=("topk", "sampled"),
        data="unlabelled",
        tasks=("classification", "language-model", "token-classification", "segmentation"),
    )

    def __init__(self, temperature: float = 4.0, alpha: float = 0.9):
        super().__init__()
        if temperature <= 0:
            raise InputError(f"KD: temperature is {temperature}, it must be positive")
        if not 0 <= alpha <= 1:
            raise InputError(f"KD: alpha is {alpha}, it must be between 0 (labels only) and 1 (teacher only)")
        self.temperature, self.alpha = temperature, alpha

    def build(self, student: Outputs, teacher: Outputs) -> None:
        same_classes(student.scores, teacher.scores)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        return teach("kd", Divergence("forward", temperature=self.temperature), student, teacher, batch, self.alpha)

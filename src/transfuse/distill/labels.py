"""Labels: plain supervised training, the baseline of every comparison and a term to add."""

from __future__ import annotations

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.labels import labels_term
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.distill.base import Distillation


class Labels(Distillation):
    """Cross-entropy on the labels; no source takes part.

        loss = CE(labels, student), mean over labelled samples or positions

    It is what the arms `scratch` and `finetune` train with, and what feature methods are added to:
    `Labels() + Hints("layer2", "layer3")`.

    Raises:
        InputError: the data has no labels.
    """

    card = Card(
        paper="supervised training",
        carries="nothing",
        teacher="none",
        data="labelled",
        tasks=("classification", "language-model", "token-classification", "segmentation"),
        control=True,
    )
    uses_source = False

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        if batch.labels is None:
            raise InputError("Labels needs labels, this data has none: use a method that learns from a teacher alone")
        return {"labels": labels_term(student.learning, batch)}

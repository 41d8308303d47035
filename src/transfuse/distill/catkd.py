"""CATKD: the student looks for every class where the teacher looks for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.class_maps import CLASS_MAPS, find_class_map_head
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, ShapeError
from transfuse.core.labels import labels_term
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses, Phase
from transfuse.core.run import Run
from transfuse.core.teacher import same_classes
from transfuse.distill.base import Distillation
from transfuse.losses import Term, mean_squared_error


class CATKD(Distillation):
    """Match class activation maps: the classifier's weights applied at every position of the last feature map.

        A[k, y, x] = sum_d w[k, d] * F[d, y, x]                 (logit k is the mean of A[k], plus a bias)
        CAT  = mean over classes and cells of (N(P(A_student)) - N(P(A_teacher)))**2,  mean over samples
        loss = labels * CE(labels, student) + beta * CAT

    P averages a map down to `size` x `size` cells, so maps may differ in size; N, where asked for, divides each
    class's pooled map by its length. All classes take part, not the true one alone. Both models must end in global
    average pooling and one linear layer; they are read, not rebuilt, and no parameters are added.

    With `labels=0` it is pure CAT, which needs no labels and is complete without them: a student whose maps are the
    teacher's has the teacher's logits, but for the bias, which no map teaches. Take `drop_bias=True` for it.

    Args:
        beta: weight of the maps. What they amount to depends on the classes, `size` and `normalise`; the authors
            choose it so that the weighted term is between 1 and 50 after the first epoch, see `magnitude`.
        labels: weight of the cross-entropy; samples without a label (-100, or no labels at all) have the maps alone.
        size: of the pooled maps; at most that of the smaller map.
        normalise: compare the shapes of the maps and not how strong they are.
        binarise: replace the teacher's maps, before pooling, by where they exceed the mean of their absolute value.
        classes: how many classes to match per sample, those with the teacher's highest logits; None takes all.
        lowest: take those with the lowest logits instead.
        drop_bias: set the bias of the student's head to zero before training and leave it out of the cross-entropy,
            as the authors' heads have none.

    Raises:
        LayerError: the head of a model is not global average pooling and one linear layer.
        VocabularyError: teacher and student count different classes.
        ShapeError: the pooled map would be larger than a map.
        InputError: an argument is out of range.

    Source: Guo, Yan, Li & Lin, CVPR 2023, arXiv:2304.12777.
    """

    card = Card(
        paper="Guo, Yan, Li & Lin, CVPR 2023",
        arxiv="2304.12777",
        sheet=13,
        carries="attention",
        teacher="features",
        data="unlabelled",
        tasks=("classification",),
    )

    def __init__(
        self,
        beta: float = 1.0,
        labels: float = 1.0,
        size: int = 2,
        normalise: bool = False,
        binarise: bool = False,
        classes: int | None = None,
        lowest: bool = False,
        drop_bias: bool = False,
    ):
        super().__init__()
        for name, value, least in (
            ("beta", beta, 0),
            ("labels", labels, 0),
            ("size", size, 1),
            ("classes", classes, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"CATKD: {name} is {value}, it must be at least {least}")
        self.beta, self.labels, self.size, self.normalise = beta, labels, size, normalise
        self.binarise, self.classes, self.lowest, self.drop_bias = binarise, classes, lowest, drop_bias
        self.register_buffer("first_epoch", torch.zeros(2))  # sum of the map term, and number of updates
        self.first_epoch: Tensor

    @property
    def magnitude(self) -> float:
        """The weighted map term, its mean over the first epoch: what to choose `beta` by."""
        total, updates = self.first_epoch.tolist()
        return self.beta * total / max(updates, 1)

    def wants(self) -> dict[str, list[str]]:
        return {"target": [CLASS_MAPS], "source": [CLASS_MAPS]}

    def build(self, student: Outputs, teacher: Outputs) -> None:
        same_classes(student.logits, teacher.logits)
        for who, outputs in (("student", student), ("teacher", teacher)):
            maps = outputs.features[CLASS_MAPS]
            if min(maps.shape[-2:]) < self.size:
                raise ShapeError(
                    f"CATKD: the {who}'s class maps have {maps.shape[-2]}x{maps.shape[-1]} positions, which cannot be "
                    f"pooled to {self.size}x{self.size}: choose a smaller size"
                )
        if self.classes is not None and self.classes > student.logits.shape[1]:
            raise InputError(f"CATKD: classes is {self.classes}, the models have {student.logits.shape[1]}")
        self.first_epoch.zero_()

    def begin_stage(self, i: int, run: Run) -> bool:
        if i == 0 and self.drop_bias:
            with run.probe():
                sample = run.data["data"].sample(2)
                assert sample is not None
                head = find_class_map_head(run["target"], sample.to(run.device).inputs)
            bias = run["target"].get_submodule(head.linear).bias
            if isinstance(bias, Tensor):
                nn.init.zeros_(bias)
        return super().begin_stage(i, run)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        ours, theirs = student.features[CLASS_MAPS], teacher.features[CLASS_MAPS]
        logits = ours.mean((2, 3)) if self.drop_bias else student.logits
        if self.binarise:
            theirs = (theirs > theirs.abs().mean((2, 3), keepdim=True)).to(theirs.dtype)
        if self.classes is not None:
            chosen = teacher.logits.topk(self.classes, largest=not self.lowest).indices
            rows = torch.arange(len(chosen), device=chosen.device)[:, None]
            ours, theirs = ours[rows, chosen], theirs[rows, chosen]
        terms = {"maps": self.beta * Term.of(mean_squared_error(self._pooled(ours), self._pooled(theirs)))}
        if batch.labels is not None and self.labels:
            terms["labels"] = self.labels * labels_term(logits, batch)
        return terms

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        if run.clock.epoch == 0 and "maps" in values:
            self.first_epoch += torch.stack([values["maps"], torch.ones_like(values["maps"])]).to(self.first_epoch)

    def _pooled(self, maps: Tensor) -> Tensor:
        """`(batch, classes, height, width)` to `(batch, classes, size * size)`."""
        cells = F.adaptive_avg_pool2d(maps, self.size).flatten(2)
        return F.normalize(cells, dim=2) if self.normalise else cells

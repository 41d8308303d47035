"""TopKD: what a teacher says about its few likeliest classes is scaled up, and compared apart from the rest."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, nearest
from transfuse.core.labels import labels_term
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.core.teacher import same_classes
from transfuse.distill.base import Distillation
from transfuse.distill.transformed import Transformed
from transfuse.losses import Term, info_nce, top_k_decoupled, top_k_linspace, top_k_scaling

SCALINGS = ("rank", "linspace")


class TopKD(Distillation):
    """Scale up the teacher's k largest logits, then match groups of logits by direction and samples by contrast.

        z'   = the teacher's logits, scaled                  (losses.top_k_scaling)
        TDL  = 1 - (alpha * cos(k largest) + beta * cos(k smallest) + cos(rest)),  where z' chooses the groups
        S    = <unit(z_i), unit(z'_j)> / tau                 for student i and teacher j of the batch
        loss = CE(labels, student) + contrast * (CE(S) + CE(S')) / 2 + decoupled * TDL,  row i of S belongs to column i

    The contrast is batch-coupled; samples of the same class are negatives of each other, as in the paper. Its least
    value is not zero, and that of TDL is `-(alpha + beta)` unless normalised. A student that equals the teacher is at
    neither, because the target is the scaled teacher. Unlabelled samples (-100) take part in all but CE.

    In front of any other logit method the scaling is :class:`TopKScaled`.

    Args:
        k: how many classes count as large; 3 to 10 in the paper, where 50 collapsed.
        contrast, decoupled: weights of the contrast and of TDL; 0 leaves one out.
        alpha, beta: weights of its k largest and k smallest.
        normalise: divide by the weights, so that the least value of TDL is zero.
        temperature: tau.
        unit_rows: take cosines in the contrast; the paper's formula has plain products.
        scaling: `"rank"`, or `"linspace"` for weights from 2 to 1 and nothing else, meant for k=20.
        growth, correction, shift: of the scaling by rank; a correction above 1 needs labels.
        centre: subtract the mean over classes from the logits of both sides first. Cosines and the scaling take zero
            for the middle, which log-probabilities are far from.

    Raises:
        InputError: an argument is out of range, labels are missing, or logits are all zero or of one sign.
        VocabularyError: teacher and student count different classes.
        ShapeError: there are not k large, k small and two other classes.

    Source: Wang & Zhou, 2025, arXiv:2508.04539. The weights of the scaling, alpha, beta and tau are this library's.
    """

    card = Card(
        paper="Wang & Zhou, 2025",
        arxiv="2508.04539",
        sheet=59,
        carries="outputs",
        teacher="full",
        data="labelled",
        tasks=("classification",),
    )

    def __init__(
        self,
        k: int = 3,
        contrast: float = 1.0,
        decoupled: float = 1.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        normalise: bool = False,
        temperature: float = 0.1,
        unit_rows: bool = True,
        scaling: str = "rank",
        growth: float = 0.5,
        correction: float = 1.5,
        shift: float = 0.1,
        centre: bool = False,
    ):
        super().__init__()
        _require(k=k, growth=growth, correction=correction, shift=shift)
        if min(alpha, beta, decoupled) < 0:
            raise InputError(
                f"TopKD: alpha, beta and decoupled must not be negative, found {alpha}, {beta}, {decoupled}"
            )
        if temperature <= 0:
            raise InputError(f"TopKD: temperature is {temperature}, it must be positive")
        if scaling not in SCALINGS:
            raise InputError(f"TopKD: unknown scaling {scaling!r}: {nearest(scaling, SCALINGS)}")
        self.k, self.contrast, self.decoupled = k, contrast, decoupled
        self.alpha, self.beta, self.normalise = alpha, beta, normalise
        self.temperature, self.unit_rows, self.scaling = temperature, unit_rows, scaling
        self.growth, self.correction, self.shift, self.centre = growth, correction, shift, centre

    def build(self, student: Outputs, teacher: Outputs) -> None:
        same_classes(student.logits, teacher.logits)
        for who, logits in (("target", student.logits), ("source", teacher.logits)):
            if not logits.any(-1).all():
                raise InputError(f"TopKD: the {who} gives a sample logits that are all zero, which have no direction")
        if not self.centre and ((teacher.logits >= 0).all() or (teacher.logits <= 0).all()):
            raise InputError("TopKD: all logits of the source have the same sign: pass centre=True")

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        ours, theirs = self._centred(student.logits), self._centred(teacher.logits)
        if self.scaling == "linspace":
            theirs = top_k_linspace(theirs, k=self.k)
        else:
            labels = _labels(batch, self.correction)
            scale = {"growth": self.growth, "correction": self.correction, "shift": self.shift}
            theirs = top_k_scaling(theirs, labels, k=self.k, **scale)
        terms = {}
        if self.contrast:
            tell = partial(info_nce, temperature=self.temperature, normalise=self.unit_rows)
            terms["contrast"] = self.contrast * Term(0.5 * (tell(ours, theirs) + tell(theirs, ours)).mean())
        if self.decoupled:
            weights = {"alpha": self.alpha, "beta": self.beta}
            groups = top_k_decoupled(ours, theirs, k=self.k, normalise=self.normalise, **weights)
            terms["decoupled"] = self.decoupled * Term.of(groups)
        if batch.labels is not None:
            terms["labels"] = labels_term(student.logits, batch)
        return terms

    def _centred(self, logits: Tensor) -> Tensor:
        return logits - logits.mean(-1, keepdim=True) if self.centre else logits


class TopKScaled(Transformed):
    """Another logit method, taught by a teacher whose k largest logits are scaled up: TopKD's scaling alone.

    `TopKScaled(KD(4)) + 0.5 * TopKD(...)`; the arguments are those of :func:`transfuse.losses.top_k_scaling`.

    Args:
        method: any method of the family, or a sum of them.
        k, growth, correction, shift: of the scaling.

    Raises:
        InputError: an argument is out of range, or labels are missing.

    Source: Wang & Zhou, 2025, arXiv:2508.04539.
    """

    def __init__(
        self, method: Distillation, k: int = 3, growth: float = 0.5, correction: float = 1.5, shift: float = 0.1
    ):
        super().__init__(method)
        _require(k=k, growth=growth, correction=correction, shift=shift)
        self.k, self.growth, self.correction, self.shift = k, growth, correction, shift

    def transform(self, teacher: Tensor, batch: Batch) -> Tensor:
        labels = _labels(batch, self.correction)
        scale = {"growth": self.growth, "correction": self.correction, "shift": self.shift}
        return top_k_scaling(teacher, labels, k=self.k, **scale)


def _labels(batch: Batch, correction: float) -> Tensor | None:
    """The labels to correct the teacher with; none where the correction is off."""
    if correction == 1:
        return None
    if batch.labels is None:
        raise InputError(
            "scaling up the true class where the teacher misses it needs labels, and this data has none: "
            "pass correction=1 to leave it out"
        )
    return batch.labels


def _require(k: int, growth: float, correction: float, shift: float) -> None:
    if k < 2 or growth < 0 or correction < 1 or shift < 0:
        raise InputError(
            "top-k scaling needs k of 2 or more, correction of 1 or more, growth and shift of 0 or more, found "
            f"k={k}, correction={correction}, growth={growth}, shift={shift}"
        )

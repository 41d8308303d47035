"""MCD: two classifiers look for target samples that they disagree on, the features move them where both agree."""

from __future__ import annotations

from torch import Tensor, nn

from transfuse.adapt.base import Adaptation, extractor, run_domains, source_labels
from transfuse.adapt.discriminator import flat
from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.taps import PENULTIMATE
from transfuse.losses import Term


class MCD(Adaptation):
    """Maximise, then minimise, the discrepancy of two classifiers F1, F2 on the target, over one extractor G.

        A   G, F1, F2:  min  CE(source labels, F1) + CE(source labels, F2)
        B   F1, F2:     min  CE(source labels, F1) + CE(source labels, F2) - d
        C   G:          min  d, `repeats` times on the same batches
        d = mean over target samples and classes of |softmax F1 - softmax F2|

    Every step does A, B and C. F1 is the model's last linear layer, G all before it, F2 a second layer like F1. The
    deployed model has F1. All passes go over both domains, for batch normalisation; each of the three keeps its own
    optimiser state.

    Args:
        repeats: how often G moves for once that F1 and F2 do.

    Raises:
        InputError: the source has no labels, or `repeats` is not positive.
        LayerError: the model does not end in a linear layer.
        ShapeError: source labels are out of the model's range, or the domains' inputs differ in shape.

    Source: Saito et al., CVPR 2018, arXiv:1712.02560.
    """

    card = Card(
        paper="Saito et al., CVPR 2018",
        arxiv="1712.02560",
        carries="data",
        teacher="data",
        data="unlabelled",
        tasks=("classification",),
    )

    def __init__(self, repeats: int = 4):
        super().__init__()
        if repeats < 1:
            raise InputError(f"MCD: repeats is {repeats}, it must be 1 or more")
        self.repeats = repeats
        self.second: nn.Module | None = None

    def wants(self) -> dict[str, list[str]]:
        return {"target": [PENULTIMATE]}

    def build(self, source: Outputs, target: Outputs) -> None:
        self.second = nn.Linear(flat(source, PENULTIMATE).shape[1], source.logits.shape[1])

    def losses(self, batches: Batches, run: Run) -> Losses:
        (first, second), _ = self._classified(batches, run)
        return _both_labels(first, second, batches["source"])

    def apart(self, batches: Batches, run: Run) -> Losses:
        """B: right on the source, and as different as can be on the target."""
        (first, second), (one, other) = self._classified(batches, run)
        labels = _both_labels(first, second, batches["source"])
        return {**labels, "discrepancy": -1.0 * Term.of(discrepancy(one, other))}

    def together(self, batches: Batches, run: Run) -> Losses:
        """C: agreement on the target."""
        return {"discrepancy": Term.of(discrepancy(*self._classified(batches, run)[1]))}

    def stage(self, i: int, run: Run) -> Stage:
        assert self.second is not None
        features = extractor(run, PENULTIMATE, type(self).__name__)
        below = set(features)
        classifiers = [*(p for p in run["target"].parameters() if p not in below), *self.second.parameters()]
        phases = [
            Phase("A: learn the source", self.losses, [*features, *classifiers]),
            Phase("B: disagree", self.apart, classifiers),
            Phase("C: agree", self.together, features, times=self.repeats),
        ]
        return Stage(self.streams(run), phases, keep="best")

    def _classified(self, batches: Batches, run: Run) -> list[tuple[Tensor, Tensor]]:
        """Logits of F1 and F2 for the source and for the target."""
        assert self.second is not None
        outputs = run_domains(run, batches["source"], batches["target"])
        return [(o.logits, self.second(flat(o, PENULTIMATE))) for o in outputs]


def discrepancy(one: Tensor, other: Tensor) -> Tensor:
    """Mean absolute difference of the class probabilities of each sample, `(batch,)`, between 0 and 2 / classes."""
    return (one.softmax(1) - other.softmax(1)).abs().mean(1)


def _both_labels(first: Tensor, second: Tensor, batch: Batch) -> Losses:
    return {"labels": source_labels(first, batch), "second labels": source_labels(second, batch)}

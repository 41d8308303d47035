"""Transformed: another method of the family, taught by logits that were changed first.

What stands between a teacher and a logit method (scaling, temperature, noise, corrections by labels) is a subclass
that says how logits change; the changes themselves are functions of :mod:`transfuse.losses.transform`.
"""

from __future__ import annotations

from torch import Tensor

from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.composition import Several
from transfuse.core.outputs import Features, Outputs
from transfuse.core.phases import Losses, Phase
from transfuse.core.run import Run
from transfuse.distill.base import Distillation


class Transformed(Several, Distillation):
    """Base of methods that change the teacher's logits in front of another method; its features stay.

    Args:
        method: any method of the family, or a sum of them.
    """

    def __init__(self, method: Distillation):
        super().__init__([method])

    def transform(self, teacher: Tensor, batch: Batch) -> Tensor:
        """The logits that the method is taught by, from those of the teacher."""
        raise NotImplementedError

    @property
    def method(self) -> Distillation:
        """The method behind the transform."""
        (method,) = self.methods
        assert isinstance(method, Distillation)
        return method

    def setup(self, run: Run, sample: Batch | None) -> None:
        self.method.setup(run, sample)
        Distillation.setup(self, run, sample)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        changed = Outputs(self.transform(teacher.logits, batch), Features(teacher.features))
        return self.method.loss(student, changed, batch, clock)

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        self.method.after_update(phase, values, run)

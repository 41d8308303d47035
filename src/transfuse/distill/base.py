"""The family of distillation: a student learns from what a frozen teacher says about the same samples.

A method of this family is one function, `loss(student, teacher, batch, clock)`. Teacher and student each run
once per step, whatever is added up.
"""

from __future__ import annotations

from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, ShapeError, TransferError
from transfuse.core.method import Method
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run


class Distillation(Method):
    """Base of the family. `"target"` is the student, `"source"` the teacher, `"data"` the only stream."""

    family = "distill"

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        """The terms of one micro-batch. Labels and mask of the batch line up with the logits."""
        raise NotImplementedError

    def build(self, student: Outputs, teacher: Outputs) -> None:
        """Check outputs of one real batch against each other, and build side modules from their shapes."""

    def losses(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        return self.loss(run("target", batch), self._teacher(batch, run), batch, run.clock)

    def setup(self, run: Run, sample: Batch | None) -> None:
        if sample is None:
            raise InputError(f"{type(self).__name__} needs data to run the teacher on: pass data=...")
        student, teacher = run("target", sample, grad=False), self._teacher(sample, run)
        self.build(student, teacher)
        self.to(run.device)
        try:
            self.loss(student, teacher, sample, run.clock)
        except TransferError:
            raise
        except ValueError as error:
            raise ShapeError(f"{type(self).__name__} cannot use this batch: {error}") from error

    def stage(self, i: int, run: Run) -> Stage:
        params = [*run["target"].parameters(), *self.parameters()]
        if "data" not in run.data:
            raise InputError(
                f"{type(self).__name__} reads one data set, found {len(run.data)}, named {', '.join(run.data)}: "
                "pass one as data=...; a mapping of tensors is one where a key is 'inputs', 'input_ids' or 'labels'"
            )
        return Stage({"data": run.data["data"]}, [Phase("student", self.losses, params)])

    def _teacher(self, batch: Batch, run: Run) -> Outputs:
        return run("source", batch, grad=False) if self.uses_source else Outputs(None)

"""Data-free transfer: a student learns from a frozen teacher on images that a generator makes.

A method of this family is two losses: what the generator learns from, and what the student learns from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from transfuse.core.batch import Batch
from transfuse.core.clock import Constant
from transfuse.core.errors import InputError, ShapeError, TransferError
from transfuse.core.method import Method
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Generated
from transfuse.core.teacher import same_classes
from transfuse.synthesize.generator import CollapseWatch, Generator


class DataFree(Method):
    """Base of the family. `"source"` is the frozen teacher, `"target"` the student, and there is no data.

    A step is a round: the generator's updates, then the student's. A round is an epoch, too, so `epochs=300` and
    `steps=300` mean the same. The teacher is in eval mode and stays bit-identical; gradients go through it to the
    images. While the generator learns, neither the student's weights nor its running statistics move. The student
    has the caller's optimiser, the generator its own Adam at a constant rate.

    Args:
        shape: of an image, `[channels, height, width]`, as the teacher takes it.
        limits: least and greatest value of a pixel.
        width: of the generator.
        lr: of the generator.
        generator_steps, student_steps: updates of each per round.
    """

    family = "synthesize"
    needs_data = False
    advice = "Lower the generator's lr."
    patience = 20

    def __init__(
        self,
        shape: Sequence[int],
        limits: Sequence[float],
        width: int,
        lr: float,
        generator_steps: int,
        student_steps: int,
    ):
        super().__init__()
        name = type(self).__name__
        if len(shape) != 3 or any(not isinstance(s, int) or s < 1 for s in shape):
            raise InputError(
                f"{name}: shape is {shape!r}, it must be [channels, height, width] of the teacher's images"
            )
        if len(limits) != 2 or limits[0] >= limits[1]:
            raise InputError(f"{name}: limits are {limits!r}, they must be [least, greatest] value of a pixel")
        for what, value in (("generator_steps", generator_steps), ("student_steps", student_steps), ("width", width)):
            if value < 1:
                raise InputError(f"{name}: {what} is {value}, it must be at least 1")
        self.shape, self.limits, self.width, self.lr = shape, limits, width, lr
        self.generator_steps, self.student_steps = generator_steps, student_steps
        self.generator: Generator | None = None
        self.collapse = CollapseWatch(self.patience, self.advice)

    def build(self, student: Outputs, teacher: Outputs, run: Run) -> None:
        """Build the generator and side modules, knowing what both say to two images."""
        raise NotImplementedError

    def generator_loss(self, batches: Batches, run: Run) -> Losses:
        """What the generator learns from in one micro-batch; `batches["noise"].size` images are made."""
        raise NotImplementedError

    def student_loss(self, batches: Batches, run: Run) -> Losses:
        """What the student learns from in one micro-batch."""
        raise NotImplementedError

    def setup(self, run: Run, sample: Batch | None) -> None:
        low, high = self.limits
        images = Batch(inputs=low + (high - low) * torch.rand(2, *self.shape, device=run.device))
        student, teacher = (self._answer(role, images, run) for role in ("target", "source"))
        same_classes(student.logits, teacher.logits)
        if teacher.logits.dim() != 2:
            raise ShapeError(
                f"{type(self).__name__} needs a classifier with logits (batch, classes), "
                f"the source gives {tuple(teacher.logits.shape)}"
            )
        self.build(student, teacher, run)
        self.to(run.device)

    def stage(self, i: int, run: Run) -> Stage:
        return self.rounds(run, [self.generator_phase(self.generator_parts()), self.student_phase(run)])

    def rounds(self, run: Run, phases: Sequence[Phase], share: float = 1.0) -> Stage:
        """A stage of rounds: nothing is read, and each round is an epoch."""
        return Stage({"noise": Generated(1)}, phases, share=share)

    def generator_parts(self) -> list[nn.Module]:
        """The modules that learn with the generator."""
        assert self.generator is not None
        return [self.generator]

    def generator_phase(self, parts: Sequence[nn.Module], betas: tuple[float, float] = (0.5, 0.999)) -> Phase:
        """The generator's updates."""
        return Phase(
            "generator",
            self.generator_loss,
            [p for part in parts for p in part.parameters()],
            adam(self.lr, betas),
            times=self.generator_steps,
            schedule=Constant(),
        )

    def student_phase(self, run: Run, *parts: nn.Module) -> Phase:
        """The student's updates, with its side modules."""
        learning = [p for part in (run["target"], *parts) for p in part.parameters()]
        return Phase("student", self.student_loss, learning, times=self.student_steps)

    def last(self, phase: Phase, run: Run) -> bool:
        """Whether this was the last update of a phase in a round."""
        return run.rep == phase.times - 1

    def _answer(self, role: str, images: Batch, run: Run) -> Outputs:
        try:
            return run(role, images, grad=False)
        except TransferError:
            raise
        except Exception as error:
            raise ShapeError(
                f"the {role}, {type(run[role]).__name__}, cannot run on images of shape={list(self.shape)}: {error}. "
                "Give the shape of the images that the teacher was trained on"
            ) from error


def adam(lr: float, betas: tuple[float, float]) -> Callable[[Any], Adam]:
    """Makes an Adam of these settings."""
    return lambda groups: Adam(groups, lr=lr, betas=betas)


def image_batch(images: Tensor) -> Batch:
    """Made images as a batch that models run on."""
    return Batch(inputs=images)

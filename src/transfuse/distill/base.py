"""The family of distillation: a student learns from what a frozen teacher says about the same samples.

A method of this family is one function, `loss(student, teacher, batch, clock)`. Teacher and student each run
once per step, whatever is added up.
"""

from __future__ import annotations

from typing import Any

from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, ShapeError, TransferError, VocabularyError
from transfuse.core.method import Method
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.vocabulary import OTHERS, common_classes, cut


class Distillation(Method):
    """Base of the family. `"target"` is the student, `"source"` the teacher, `"data"` the only stream."""

    family = "distill"
    reads_apart: bool = False
    """Whether the teacher may read other tokens than the student, so that positions do not compare."""
    _common: tuple[Any, int] | None = None

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        """The terms of one micro-batch. Labels and mask of the batch line up with the logits."""
        raise NotImplementedError

    def build(self, student: Outputs, teacher: Outputs) -> None:
        """Check outputs of one real batch against each other, and build side modules from their shapes."""

    def losses(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        return self.loss(*self._shared(run("target", batch), self._teacher(batch, run), batch, run), batch, run.clock)

    def setup(self, run: Run, sample: Batch | None) -> None:
        if sample is None:
            raise InputError(f"{type(self).__name__} needs data to run the teacher on: pass data=...")
        student, teacher = run("target", sample, grad=False), self._teacher(sample, run)
        student, teacher = self._shared(student, teacher, sample, run)
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
        return run("source", batch.for_source(), grad=False) if self.uses_source else Outputs(None)

    def _shared(self, student: Outputs, teacher: Outputs, batch: Batch, run: Run) -> tuple[Outputs, Outputs]:
        """The outputs of two language models, cut to the tokens that both have where a head is padded.

        Raises:
            InputError: the data has tokens of the teacher's own, and a method compares position by position.
            VocabularyError: the models mean different tokens, or a label is none that both have.
        """
        if batch.for_source() is not batch and self.uses_source:
            for part in self.parts:
                if part.uses_source and not getattr(part, "reads_apart", False):
                    raise InputError(
                        f"{type(part).__name__} compares target and source position by position, and this data has "
                        f"inputs of the source's own. Methods that work: {OTHERS}; or leave out 'source' of the data"
                    )
            return student, teacher
        if run.task != "language-model" or not self.uses_source or not _say_their_tokens(run):
            return student, teacher
        sizes = student.scores.shape[-1], teacher.scores.shape[-1]
        key = (id(run["target"]), id(run["source"]), *sizes)
        if self._common is None or self._common[0] != key:  # remembered, for tokenizers are long
            self._common = key, common_classes(run["target"], run["source"], *sizes)
        common = self._common[1]
        if sizes == (common, common):
            return student, teacher
        if batch.labels is not None and bool((batch.labels >= common).any()):
            raise VocabularyError(
                f"the label {int(batch.labels.max())} is none of the {common} tokens that target and source share: "
                "the text has tokens that only one of them knows"
            )
        return cut(student, common), cut(teacher, common)


def _say_their_tokens(run: Run) -> bool:
    """Whether both models say what their ids mean; where those of Hugging Face do not, the user is told once."""
    models = run["target"], run["source"]
    if all(getattr(model, "tokenizer", None) is not None for model in models):
        return True
    if all(hasattr(getattr(model, "config", None), "vocab_size") for model in models):
        run.watch.say(
            "vocabulary not known",
            "nothing says what the ids of target and source mean, so that both have the same tokens is taken for "
            "granted: set `model.tokenizer` on both, and the bytes of their tokens are compared",
        )
    return False

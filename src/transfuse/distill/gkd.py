"""GKD: generalised knowledge distillation, partly on what the student writes itself."""

from __future__ import annotations

import torch

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses
from transfuse.core.run import Run
from transfuse.core.teacher import same_classes
from transfuse.distill.base import Distillation
from transfuse.distill.on_policy import written
from transfuse.losses import Divergence, Term, match


class GKD(Distillation):
    """Match the teacher on texts of the data and on texts of the student, so that it learns from its own mistakes.

        loss = JSD_beta(teacher, student), a mean over the scored tokens of an update

    In a share of the updates the answers of the batch are replaced by those that the student writes to its prompts, by
    sampling; no gradient flows through that. Both models then read the same text. The generalised Jensen-Shannon
    divergence is beta * KL(teacher || m) + (1 - beta) * KL(student || m), m = beta * teacher + (1 - beta) * student.

    Args:
        share: of updates on the student's own texts, in [0, 1].
        beta: in (0, 1), or 0 for KL(teacher || student) and 1 for KL(student || teacher), which the divergence, scaled,
            tends to at these ends. TRL counts beta the same way.
        temperature: of the sampling.
        prompt: tokens of plain text that serve as a prompt; where prompts are marked (labels -100) they are taken.
        length: tokens that are written at most; None writes as many as the texts of the batch are long.
        end: id of the token that ends an answer.

    Raises:
        InputError: an argument is out of its range, or prompts leave nothing to write.
        VocabularyError: teacher and student count different classes.

    Source: Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist & Bachem, ICLR 2024, arXiv:2306.13649.
    """

    card = Card(
        paper="Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist & Bachem, ICLR 2024",
        arxiv="2306.13649",
        carries="outputs",
        teacher="full",
        data="unlabelled",
        tasks=("language-model",),
    )

    def __init__(
        self,
        share: float = 0.5,
        beta: float = 0.5,
        temperature: float = 1.0,
        prompt: int = 8,
        length: int | None = None,
        end: int | None = None,
    ):
        super().__init__()
        if not 0 <= share <= 1:
            raise InputError(f"GKD: share is {share}, it must be between 0 (the data) and 1 (the student's own texts)")
        if not 0 <= beta <= 1:
            raise InputError(f"GKD: beta is {beta}, it must be between 0 and 1")
        if temperature <= 0 or prompt < 1 or (length is not None and length < 1):
            raise InputError("GKD: temperature must be positive, prompt and length at least 1")
        self.share, self.beta, self.temperature = share, beta, temperature
        self.prompt, self.length, self.end = prompt, length, end

    def build(self, student: Outputs, teacher: Outputs) -> None:
        same_classes(student.scores, teacher.scores)

    def losses(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        # One coin for all micro-batches and processes, so that an update is of one kind.
        if float(torch.rand((), generator=run.shared_rng("GKD"))) < self.share:
            batch = written("target", batch, run, self.prompt, self.length, self.end, self.temperature)
        return self.loss(*self._shared(run("target", batch), self._teacher(batch, run), batch, run), batch, run.clock)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        kinds = {0.0: Divergence("forward"), 1.0: Divergence("reverse")}
        divergence = kinds.get(self.beta) or Divergence("jensen_shannon", self.beta)
        values, _ = match(student.learning, teacher.scores, divergence, rows=batch.mask)
        # How many tokens answers have is known only once they are written.
        return {"gkd": Term.of(values, batch.mask, "late:token")}

"""LLM-Neo: distillation into low-rank adapters, which are merged in the end."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from transfuse.core.adapters import adapted
from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.teacher import same_classes
from transfuse.core.teaching import teach
from transfuse.distill.base import Distillation
from transfuse.losses import Divergence

ADAM_BYTES = 8
"""Two moments in float32."""


class LLMNeo(Distillation):
    """Distil into a low-rank addition to every linear layer; the student's own weights stay as they are.

        W' = W + alpha / rank * B A                     A (rank, in) random, B (out, rank) zero at first
        loss = (1 - kd_ratio) * CE(labels, student) + kd_ratio * T**2 * KL(softmax(teacher / T) || softmax(student / T))

    Only A and B are trained, so gradients and the optimiser's state are small: by the chain rule they are KD's
    gradient G of W, projected: dL/dB = alpha / rank * G A^T and dL/dA = alpha / rank * B^T G. Embeddings and the output
    layer get no adapter. What is deployed is a plain model of the student's class with the additions merged into its
    weights: it costs no more than the student. A student that has adapters already (PEFT's) can be taught by KD or any
    other method.

    Args:
        rank: of the addition to each layer, at least 1.
        alpha: its scale is alpha / rank; by default 2 * rank, as in the framework of the authors' code.
        kd_ratio: weight of the teacher, in [0, 1]; 0 is plain LoRA, 1 uses no labels.
        temperature: T > 0.
        lr_scale: factor of the caller's learning rate: adapters take about ten times that of full training.

    Raises:
        InputError: an argument is out of its range; the student has no layer to adapt, or has adapters already; a
            moving average is asked for.
        MissingExtraError: PEFT is not installed.
        VocabularyError: teacher and student count different classes.

    Source: Yang, Du, Zhou, Wang, Wong & Chen, 2024, arXiv:2411.06839.
    """

    card = Card(
        paper="Yang et al., 2024",
        arxiv="2411.06839",
        sheet=80,
        carries="outputs",
        teacher="full",
        also=("topk", "sampled"),
        data="unlabelled",
        tasks=("language-model",),
    )

    def __init__(
        self,
        rank: int = 64,
        alpha: float | None = None,
        kd_ratio: float = 0.5,
        temperature: float = 1.0,
        lr_scale: float = 10.0,
    ):
        super().__init__()
        if rank < 1:
            raise InputError(f"LLMNeo: rank is {rank}, it must be at least 1")
        if alpha is not None and not alpha > 0:
            raise InputError(f"LLMNeo: alpha is {alpha}, it must be positive")
        if not 0 <= kd_ratio <= 1:
            raise InputError(f"LLMNeo: kd_ratio is {kd_ratio}, it must be between 0 (labels only) and 1 (teacher only)")
        if not temperature > 0 or not lr_scale > 0:
            raise InputError(f"LLMNeo: temperature is {temperature} and lr_scale {lr_scale}, both must be positive")
        self.rank, self.alpha, self.kd_ratio = rank, alpha, kd_ratio
        self.temperature, self.lr_scale = temperature, lr_scale
        self.additions = nn.ParameterDict()
        """A and B of every layer, the adapted model's own."""
        self._lora: tuple[Any, ...] = ()  # not a submodule: the student's weights are no state of this method

    def setup(self, run: Run, sample: Batch | None) -> None:
        if sample is None:
            raise InputError("LLMNeo needs data to run the teacher on: pass data=...")
        if run.training is not None and run.training.ema is not None:
            raise InputError(
                f"ema is {run.training.ema}: it averages weights of the student that stay as they are: leave it out"
            )
        lora = adapted(run["target"], sample.inputs, self.rank, 2 * self.rank if self.alpha is None else self.alpha)
        self._lora = (lora,)
        learned = {name: p for name, p in lora.model.named_parameters() if p.requires_grad}
        self.additions = nn.ParameterDict({name.replace(".", "/"): p for name, p in learned.items()})
        run.add("adapted", lora.model)
        super().setup(run, sample)

    def build(self, student: Outputs, teacher: Outputs) -> None:
        same_classes(student.scores, teacher.scores)

    def losses(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        outputs = self._shared(run("adapted", batch), self._teacher(batch, run), batch, run)
        return self.loss(*outputs, batch, run.clock)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        divergence = Divergence("forward", temperature=self.temperature)
        return teach("kd", divergence, student, teacher, batch, self.kd_ratio)

    def stage(self, i: int, run: Run) -> Stage:
        stage = super().stage(i, run)
        group = {"params": list(self.additions.values()), "lr_scale": self.lr_scale}
        return Stage(stage.streams, [Phase("adapters", self.losses, [group])], train=("adapted",))

    def learns(self, i: int) -> Iterator[nn.Parameter]:
        yield from self.additions.values()

    def deploy(self, target: nn.Module) -> nn.Module:
        merged = copy.deepcopy(self._lora[0]).merge_and_unload()
        for p, own in zip(merged.parameters(), target.parameters(), strict=True):
            p.requires_grad_(own.requires_grad)
        return merged

    def panels(self) -> list[dict[str, Any]]:
        if not self._lora:
            return []
        trained = sum(p.numel() for p in self.additions.values())
        whole = sum(p.numel() for p in self._lora[0].model.parameters()) - trained
        return [
            {
                "kind": "matrix",
                "title": "What was trained",
                "note": "Adam keeps two numbers for each trained parameter.",
                "rows": ["adapters", "all of the student"],
                "columns": ["parameters", "bytes of Adam's state"],
                "values": [[float(n), float(n * ADAM_BYTES)] for n in (trained, whole)],
            }
        ]

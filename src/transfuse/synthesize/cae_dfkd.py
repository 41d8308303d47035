"""CAE-DFKD: data-free distillation with category-aware embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import CapabilityError, InputError, nearest
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.taps import batch_norms
from transfuse.losses import (
    Term,
    agreeing_divergence,
    batch_norm_distance,
    category_contrast,
    cross_entropy,
    kl_divergence,
)
from transfuse.synthesize.base import DataFree, image_batch
from transfuse.synthesize.category_noise import SOURCES, CategoryNoise, Drawn, category_embeddings
from transfuse.synthesize.generator import Generator, Pool, gather, redraw

CODE = 128
"""Size of the vectors that are contrasted."""


class CAEDFKD(DataFree):
    """Distil without data: noise around text embeddings of the classes drives the generator, and contrasts classes.

    A round, with teacher T, student S, generator G, and x = G(e_c + M_n * q), q ~ noise source n (CEND):

        generator:  one_hot * CE(T(x), c) + batch_norm * sum_l (|mu_l - mu_l^BN| + |var_l - var_l^BN|)
                    - adversarial * mean_i 1[argmax S = argmax T] KL(T(x_i) || S(x_i))
        student:    t^2 KL(softmax(T(x) / t) || softmax(S(x) / t)) on images of the pool
                    + contrast * mean_i -log [sum_{j in P(i)} exp(h_i h_j / tau) / sum_{j != i} exp(h_i h_j / tau)]

    Classes, sources and noise are drawn once a round; the batch with the least generator loss goes into the pool. The
    layer between embedding and generator is redrawn every round and the generator every `life` rounds, and their
    optimiser forgets. The run begins with rounds that only fill the pool, without the adversarial term. CNCL: h are
    projections of the student's penultimate features of freshly made pairs, half of the student's batch; P(i) holds the
    samples of i's class that were diffused by another source. The projection is gone from the deployed student.

    Args:
        shape: of an image, `[channels, height, width]`.
        names: of the classes, for the text encoder (extra `text`); None embeds their indices.
        categories: False puts z ~ N(0, I) in the place of the embeddings: the plain generator.
        sources: of noise, from gaussian, uniform, laplace and masked.
        magnitude: M_n for all sources, or one each, in units of the embeddings' root mean square.
        learn_magnitude: learn a vector M_n with the generator.
        temperature: t.
        one_hot, batch_norm, adversarial, contrast: weights of the terms; 0 leaves a term out.
        contrast_temperature: tau.
        warmup: share of the rounds that only fill the pool.
        life: rounds after which the generator is redrawn.
        slots: batches that the pool holds.
        latent: size of the vectors between embedding and generator.
        lr, width, limits, generator_steps, student_steps: see :class:`DataFree`.

    Raises:
        CapabilityError: the teacher has no batch normalisation, and `batch_norm` is not 0.
        InputError: as many names as logits are needed, each with an embedding of its own.
        ShapeError: source and target do not run on this shape, or count different classes.

    Source: CAE-DFKD, DAC 2025, arXiv:2504.21478; the engine and its constants: NAYER, CVPR 2024, arXiv:2310.00258.
    """

    card = Card(
        paper="CAE-DFKD, DAC 2025",
        arxiv="2504.21478",
        sheet=24,
        carries="data",
        teacher="features",
        data="none",
        tasks=("classification",),
    )
    advice = (
        "Lower lr or life, raise one_hot, or lower magnitude: noise that drowns the embeddings drowns the classes, "
        "none at all leaves one image per class."
    )

    def __init__(
        self,
        shape: Sequence[int],
        names: Sequence[str] | None = None,
        categories: bool = True,
        sources: Sequence[str] = ("gaussian", "uniform", "laplace", "masked"),
        magnitude: float | Sequence[float] = 1.0,
        learn_magnitude: bool = False,
        temperature: float = 20.0,
        one_hot: float = 0.5,
        batch_norm: float = 10.0,
        adversarial: float = 1.33,
        contrast: float = 1.0,
        contrast_temperature: float = 0.1,
        warmup: float = 0.25,
        life: int = 10,
        slots: int = 1000,
        latent: int = 256,
        lr: float = 4e-3,
        width: int = 64,
        limits: Sequence[float] = (0.0, 1.0),
        generator_steps: int = 40,
        student_steps: int = 200,
    ):
        super().__init__(shape, limits, width, lr, generator_steps, student_steps)
        self.names, self.categories, self.sources, self.magnitude = names, categories, sources, magnitude
        self.learn_magnitude, self.temperature = learn_magnitude, temperature
        self.one_hot, self.batch_norm, self.adversarial, self.contrast = one_hot, batch_norm, adversarial, contrast
        self.contrast_temperature, self.warmup, self.life, self.slots = contrast_temperature, warmup, life, slots
        self.latent = latent
        self._check()
        self.noise: CategoryNoise | None = None
        self.projector: nn.Sequential | None = None
        self.pool = Pool(slots)
        self.register_buffer("warming", torch.tensor(True))
        self.warming: Tensor
        self.units = {"pooled": self._pooled}
        self._drawn: dict[int, Drawn] = {}
        self._made: list[tuple[Tensor, Tensor, Tensor]] = []
        self._best: tuple[float, list[tuple[Tensor, Tensor, Tensor]]] | None = None

    def wants(self) -> dict[str, list[str]]:
        taps = {"source": ["batchnorm"] if self.batch_norm else [], "target": ["penultimate"] if self.contrast else []}
        return {role: names for role, names in taps.items() if names}

    def setup(self, run: Run, sample: Batch | None) -> None:
        if self.batch_norm and not batch_norms(run["source"]):
            raise CapabilityError(
                "CAEDFKD reads the running statistics of the teacher's batch normalisation, "
                f"{type(run['source']).__name__} has none: give a teacher that was trained with it, or say batch_norm=0"
            )
        super().setup(run, sample)

    def build(self, student: Outputs, teacher: Outputs, run: Run) -> None:
        classes = teacher.logits.shape[1]
        embeddings = category_embeddings(self.names, classes)
        sources, magnitudes = self.sources, self._magnitudes()
        if not self.categories:
            embeddings, sources, magnitudes = torch.zeros_like(embeddings), ("gaussian",), [1.0]
        self.noise = CategoryNoise(embeddings, sources, magnitudes, self.latent, self.learn_magnitude)
        self.generator = Generator(self.shape, self.latent, self.width, self.limits)
        if self.contrast:
            size = student.features["penultimate"].flatten(1).shape[1]
            self.projector = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, CODE))

    # Stages and rounds -----------------------------------------------------------------------------------------

    def begin_stage(self, i: int, run: Run) -> bool:
        self.warming.fill_(i == 0)
        return i < 2

    def stage(self, i: int, run: Run) -> Stage:
        assert self.generator is not None
        assert self.noise is not None
        generator = self.generator_phase([self.generator, self.noise])
        if i == 0:
            return self.rounds(run, [generator], share=self.warmup)
        student = self.student_phase(run, *([self.projector] if self.projector else []))
        return self.rounds(run, [generator, student], share=1 - self.warmup)

    def learns(self, i: int) -> Iterator[nn.Parameter]:
        parts = [self.generator, self.noise, self.projector if i else None]
        return (p for part in parts if part is not None for p in part.parameters())

    def begin_epoch(self, run: Run) -> None:
        """A new round: new draws, a new mixing layer, now and then a new generator."""
        assert self.generator is not None
        assert self.noise is not None
        self._drawn, self._made, self._best = {}, [], None
        redraw(self.noise.mix, run.shared_rng("mix"))
        if run.clock.step % self.life == 0:
            redraw(self.generator, run.shared_rng("generator"))
        run.reset_optim("generator")

    # The generator ---------------------------------------------------------------------------------------------

    def generator_loss(self, batches: Batches, run: Run) -> Losses:
        batch = batches["noise"]
        drawn = self.drawn(batch)
        images = self.images(drawn)
        teacher = run("source", image_batch(images), own=True)
        terms = {"one_hot": self.one_hot * Term.of(cross_entropy(teacher.logits, drawn.labels))}
        if self.batch_norm:
            layers: list[Any] = [*batch_norms(run["source"]).values()]
            statistics = [m.running_mean for m in layers], [m.running_var for m in layers]
            distance = batch_norm_distance(teacher.features["batchnorm"], *statistics)
            terms["batch_norm"] = self.batch_norm * Term(distance)
        if self.adversarial and not self.warming:
            student = run("target", image_batch(images))
            terms["adversarial"] = self.adversarial * Term.of(-agreeing_divergence(student.logits, teacher.logits))
        self._made.append((batch.index, images.detach(), teacher.logits.detach()))
        return terms

    def drawn(self, batch: Batch) -> Drawn:
        """What was drawn for a micro-batch: the same in every update of a round."""
        assert self.noise is not None
        first = int(batch.index[0])
        if first not in self._drawn:
            self._drawn[first] = self.noise.draw(batch.size)
        return self._drawn[first]

    def images(self, drawn: Drawn) -> Tensor:
        """What the generator makes of classes and noise."""
        assert self.generator is not None
        assert self.noise is not None
        return self.generator(self.noise(drawn))

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        if phase.name != "generator":
            return
        cost = sum(getattr(self, name) * float(value) for name, value in values.items())
        if self._best is None or cost < self._best[0]:
            self._best = (cost, self._made)
        self._made = []
        if self.last(phase, run):
            best = self._best[1]
            self.pool.push(gather([(numbers, images) for numbers, images, _ in best], run))
            images, logits = (torch.cat([piece[k] for piece in best]) for k in (1, 2))
            self.collapse.look(images, logits, run)

    # The student -----------------------------------------------------------------------------------------------

    def student_loss(self, batches: Batches, run: Run) -> Losses:
        batch = batches["noise"]
        if self.contrast and batch.size < 8:
            raise InputError(f"CAEDFKD contrasts half of each (micro-)batch, found {batch.size} samples: use 8 or more")
        images = pooled = self.pool.draw(self._pooled(batch))
        if self.contrast:
            made, positives = self._contrasted(self._pairs(batch))
            images = torch.cat([pooled, made])
        student = run("target", image_batch(images))
        teacher = run("source", image_batch(pooled), grad=False)
        divergence = kl_divergence(student.logits[: len(pooled)], teacher.logits, temperature=self.temperature)
        terms = {"kd": Term.of(divergence, unit="pooled")}
        if self.projector:
            codes = self.projector(student.features["penultimate"][len(pooled) :].flatten(1))
            values = category_contrast(codes, positives, self.contrast_temperature)
            terms["contrast"] = self.contrast * Term(values.mean())
        return terms

    def _pairs(self, batch: Batch) -> int:
        return batch.size // 4 if self.contrast else 0

    def _pooled(self, batch: Batch) -> int:
        return batch.size - 2 * self._pairs(batch)

    @torch.no_grad()
    def _contrasted(self, pairs: int) -> tuple[Tensor, Tensor]:
        """Freshly made images of `pairs` classes, two of each from different sources, and who is whose positive."""
        assert self.noise is not None
        drawn, positives = self.noise.pairs(pairs)
        return self.images(drawn), positives

    # Arguments -------------------------------------------------------------------------------------------------

    def _magnitudes(self) -> list[float]:
        return [*self.magnitude] if isinstance(self.magnitude, Sequence) else [self.magnitude] * len(self.sources)

    def _check(self) -> None:
        for source in self.sources:
            if source not in SOURCES:
                raise InputError(f"CAEDFKD: unknown source of noise {source!r}: {nearest(source, SOURCES)}")
        if not self.sources or len(self._magnitudes()) != len(self.sources):
            raise InputError(f"CAEDFKD: {len(self._magnitudes())} magnitudes for {len(self.sources)} sources of noise")
        if self.temperature <= 0 or self.contrast_temperature <= 0:
            raise InputError("CAEDFKD: temperature and contrast_temperature must be positive")
        if not 0 < self.warmup < 1:
            raise InputError(f"CAEDFKD: warmup is {self.warmup}, it must lie between 0 and 1: the pool must be filled")
        if self.life < 1 or self.slots < 1:
            raise InputError("CAEDFKD: life and slots must be at least 1")
        if self.contrast and (not self.categories or len(self.sources) < 2):
            raise InputError(
                "CAEDFKD contrasts samples of one class from different sources of noise: give at least two sources and "
                "categories=True, or say contrast=0"
            )

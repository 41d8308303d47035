"""Learning to retain while acquiring: a student update for data-free distillation that forgets less."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Constant
from transfuse.core.errors import CapabilityError, InputError, nearest
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.virtual import virtual_step
from transfuse.losses import Term, clamped_jensen_shannon, cross_entropy, marginal_entropy, mean_absolute_error
from transfuse.synthesize.base import DataFree, adam, image_batch
from transfuse.synthesize.generator import Generator, gather
from transfuse.synthesize.memory import SHARE, GenerativeMemory, RingMemory

MEMORIES = ("buffer", "generative", "none")


class RetainAcquire(DataFree):
    """Adversarial data-free distillation whose student step also looks at what it will do to remembered images.

    With teacher T, student S of weights theta, generator G, d(a, b) = mean |a - b| of raw logits, x = G(z),
    z ~ N(0, I) and an eighth as many remembered images m, a round is

        generator:  one_hot * CE(T(x), argmax T(x)) + balance * sum_c p_c log10 p_c - activation * mean |f_T(x)| + D,
                    D = 1 - clamp(J, 0, 1), J = 1/2 [KL(M || P) + KL(M || Q)], P, Q = softmax(logits / 3) of T and S
        virtual:    theta' = theta - inner_lr * (grad d(S(x), T(x)) + inner_decay * theta)
        student:    d(S([x; m]), T([x; m])) + retain * d(S_theta'(m), T(m))

    p is the batch mean of softmax T, f_T the teacher's last feature; D's gradient goes through S alone. To first order
    the last term adds -inner_lr * <grad acquire, grad retain>: it makes the two gradients agree. The student's running
    statistics move once per update, in the first term. On several processes, or with micro-batches, each takes its own
    virtual step. While the memory is empty the update is d(S(x), T(x)).

    Args:
        shape: of an image, `[channels, height, width]`.
        inner_lr: length of the virtual step; not the student's own lr.
        inner_decay: weight decay of the virtual step.
        retain: weight of the meta term; 0 is plain replay.
        first_order: leave out second derivatives.
        release_bug: the virtual step starts from copies, as in the authors' release, so the meta term teaches nothing.
        memory: `"buffer"`, a ring of earlier batches; `"generative"`, an autoencoder; or `"none"`.
        slots, every: of the buffer: its batches, and the rounds between two of them.
        one_hot, balance, activation: weights in the generator's loss.
        latent: size of z.
        lr, width, limits, generator_steps, student_steps: see :class:`DataFree`.

    Raises:
        CapabilityError: an operation of the student cannot be differentiated twice.
        InputError: an inner_lr that is not positive; nothing is remembered, and `retain` is not 0.
        ShapeError: source and target do not run on this shape, or count different classes.

    Source: Patel, Mopuri & Qiu, CVPR 2023, arXiv:2302.14290.
    """

    card = Card(
        paper="Patel, Mopuri & Qiu, CVPR 2023",
        arxiv="2302.14290",
        sheet=79,
        carries="data",
        teacher="features",
        data="none",
        tasks=("classification",),
    )
    advice = "Lower lr, or raise balance or one_hot."

    def __init__(
        self,
        shape: Sequence[int],
        inner_lr: float = 0.9,
        inner_decay: float = 5e-4,
        retain: float = 1.0,
        first_order: bool = False,
        release_bug: bool = False,
        memory: str = "buffer",
        slots: int = 10,
        every: int = 360,
        one_hot: float = 1.0,
        balance: float = 5.0,
        activation: float = 0.1,
        latent: int = 1000,
        lr: float = 0.02,
        width: int = 64,
        limits: Sequence[float] = (0.0, 1.0),
        generator_steps: int = 1,
        student_steps: int = 10,
    ):
        super().__init__(shape, limits, width, lr, generator_steps, student_steps)
        if inner_lr <= 0:
            raise InputError(
                f"RetainAcquire: inner_lr is {inner_lr}, it must be positive; retain=0 leaves out the step"
            )
        if memory not in MEMORIES:
            raise InputError(f"RetainAcquire: unknown memory {memory!r}: {nearest(memory, MEMORIES)}")
        if retain and (memory == "none" or slots < 1):
            raise InputError("RetainAcquire: nothing is remembered, so nothing can be retained: say retain=0, or slots")
        if every < 1:
            raise InputError(f"RetainAcquire: every is {every}, it must be at least 1 round")
        self.inner_lr, self.inner_decay, self.retain = inner_lr, inner_decay, retain
        self.first_order, self.release_bug = first_order, release_bug
        self.memory, self.slots, self.every = memory, slots, every
        self.one_hot, self.balance, self.activation, self.latent = one_hot, balance, activation, latent
        self.ring = RingMemory(slots, every) if memory == "buffer" and slots else None
        self.autoencoder: GenerativeMemory | None = None
        self._made: tuple[Tensor, Tensor] | None = None
        self._seen: list[tuple[Tensor, Tensor]] = []

    def wants(self) -> dict[str, list[str]]:
        return {"source": ["penultimate"]}

    def build(self, student: Outputs, teacher: Outputs, run: Run) -> None:
        self.generator = Generator(self.shape, self.latent, self.width, self.limits)
        if self.memory == "generative":
            self.autoencoder = GenerativeMemory(self.shape, self.width, self.limits)
        if self.retain:
            self._require_second_derivatives(run)

    def stage(self, i: int, run: Run) -> Stage:
        phases = [self.generator_phase(self.generator_parts(), betas=(0.9, 0.999)), self.student_phase(run)]
        if self.autoencoder:
            learning = self.autoencoder.parameters()
            optim = adam(self.lr / 40, (0.9, 0.999))
            phases.insert(1, Phase("memory", self.memory_loss, learning, optim, times=4, schedule=Constant()))
        return self.rounds(run, phases)

    # The generator and the memory ------------------------------------------------------------------------------

    def generator_loss(self, batches: Batches, run: Run) -> Losses:
        images = self.made(batches["noise"].size, run)
        teacher = run("source", image_batch(images), own=True)
        student = run("target", image_batch(images))
        apart = clamped_jensen_shannon(student.logits, teacher.logits.detach()).clamp(0, 1)
        self._made = (images.detach(), teacher.logits.detach())
        return {
            "one_hot": self.one_hot * Term.of(cross_entropy(teacher.logits, teacher.logits.detach().argmax(1))),
            "balance": self.balance * Term(imbalance(teacher.logits)),
            "activation": self.activation * Term(-teacher.features["penultimate"].abs().mean()),
            "agreement": Term(1 - apart),
        }

    def memory_loss(self, batches: Batches, run: Run) -> Losses:
        assert self.autoencoder is not None
        return self.autoencoder.loss(self.new_images(batches["noise"], run), run)

    def made(self, count: int, run: Run) -> Tensor:
        """Images of the generator, with their graph."""
        assert self.generator is not None
        return self.generator(torch.randn(count, self.latent, device=run.device))

    @torch.no_grad()
    def new_images(self, batch: Batch, run: Run) -> Tensor:
        """The images that a micro-batch of the student acquires."""
        return self.made(batch.size, run)

    def recalled(self, batch: Batch, run: Run) -> Tensor | None:
        """The images that a micro-batch of the student retains; None while there are none."""
        if self.ring:
            return self.ring.recall(batch, run)
        if self.autoencoder and self.autoencoder.rounds:
            return self._imagined(max(2, batch.size // SHARE), run)
        return None

    def _imagined(self, count: int, run: Run) -> Tensor:
        """Images of the autoencoder, of codes that one step of Adam has made typical and clear to the teacher."""
        assert self.autoencoder is not None
        z = self.autoencoder.sample(count).requires_grad_()
        logits = run("source", image_batch(self.autoencoder.decoder(z)), own=True).logits
        clear = self.one_hot * cross_entropy(logits, logits.detach().argmax(1)).mean()
        typical = F.mse_loss(z.var(), torch.ones_like(z.var())) + z.mean().square()
        (gradient,) = torch.autograd.grad(clear + self.balance * imbalance(logits) + typical, z)
        with torch.no_grad():  # a first step of Adam has the length of its rate in every entry
            return self.autoencoder.decoder(z - self.lr * gradient / (gradient.abs() + 1e-8))

    # The student -----------------------------------------------------------------------------------------------

    def student_loss(self, batches: Batches, run: Run) -> Losses:
        batch = batches["noise"]
        new, old = self.new_images(batch, run), self.recalled(batch, run)
        self._seen.append((batch.index, new))
        images = new if old is None else torch.cat([new, old])
        wanted = run("source", image_batch(images), grad=False).logits
        apart = mean_absolute_error(run("target", image_batch(images)).logits, wanted)
        share = len(new) / len(images)  # one mean over both, in two terms
        terms = {"acquire": share * Term.of(apart[: len(new)])}
        if old is not None:
            terms["replay"] = (1 - share) * Term(apart[len(new) :].mean())
            if self.retain:
                terms["retain"] = self.retain * Term(self.retention(new, old, wanted, run))
        return terms

    def retention(self, new: Tensor, old: Tensor, wanted: Tensor, run: Run) -> Tensor:
        """d(S_theta'(old), T(old)) after the virtual step on the new images, as a function of theta.

        Args:
            wanted: the teacher's logits for both, new ones first.
        """
        weights: dict[str, Tensor] = dict(run["target"].named_parameters())
        if self.release_bug:
            weights = {name: p.detach().requires_grad_(p.requires_grad) for name, p in weights.items()}

        def distance(theta: dict[str, Tensor], images: Tensor, wanted: Tensor) -> Tensor:
            buffers = {name: b.clone() for name, b in run["target"].named_buffers()}  # these may move, not S's own
            answer = run("target", image_batch(images), params={**buffers, **theta})
            return mean_absolute_error(answer.logits, wanted).mean()

        acquired = distance(weights, new, wanted[: len(new)])
        moved = virtual_step(acquired, weights, self.inner_lr, self.inner_decay, self.first_order)
        return distance(moved, old, wanted[len(new) :])

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        seen, self._seen = self._seen, []
        if phase.name == "generator" and self.last(phase, run):
            assert self._made is not None
            self.collapse.look(*self._made, run)
        if phase.name == "memory" and self.autoencoder and self.last(phase, run):
            self.autoencoder.rounds += 1
        if phase.name == "student" and self.ring and self.last(phase, run) and self.ring.due(run):
            self.ring.store(gather(seen, run))

    def _require_second_derivatives(self, run: Run) -> None:
        images = torch.rand(4, *self.shape, device=run.device)
        wanted = run("source", image_batch(images), grad=False).logits
        try:
            # Not autograd.grad: on its way to given inputs alone it passes by operations that would complain.
            self.retention(images[:2], images[2:], wanted, run).backward()
        except RuntimeError as error:
            if self.first_order or self.release_bug:
                raise
            raise CapabilityError(
                f"RetainAcquire needs second derivatives of the target, {type(run['target']).__name__}, and an "
                f"operation has none: {error}. Say first_order=True, or replace the operation"
            ) from error


def imbalance(logits: Tensor) -> Tensor:
    """Sum over classes of p log10 p, for the mean p of the predictions: -log10(classes) where they are balanced."""
    return -marginal_entropy(logits) / math.log(10)

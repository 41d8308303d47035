"""Swing distillation: targets of private tokens are flat and noisy, those of ordinary ones sharp."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from transfuse.core import rng
from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.core.teacher import same_classes
from transfuse.distill.base import Distillation
from transfuse.losses import Term, cross_entropy

SMALLEST = 1e-8
PATTERNS = (r"[\w.+-]+@[\w-]+\.[\w.]+", r"\d{2,}")
"""E-mail addresses, and runs of two or more digits."""


class Swing(Distillation):
    """Teach ordinary tokens as they are, and private ones so that the student cannot learn them.

    With u in [0, 1] how private a token is, and e noise of scale `noise * u`, drawn for every class:

        T = low + (high - low) * u
        p = normalised(max(softmax(teacher / T) + e, 0))
        loss = alpha * KL(p || softmax(student / T)) + (1 - alpha) * [u < gate] * CE(label, student)

    both means over the scored tokens. Flattening keeps the order of a secret's tokens; it is the noise, and labels
    that are kept back, which hide it. The noise of a text is the same whenever the text is read, so it cannot be
    averaged away over epochs. Cutting at 0 biases small probabilities upwards.

    The batch brings `privacy`, `(batch, tokens)`: u of each token of the text (where it is the one to be predicted, so
    it is shifted here as labels are). Ways to find it: rules, :func:`rule_scores`; a tagger, :func:`tagger_scores`; or
    how much better the teacher knows a token than a public model does, :func:`exposure_scores`.

    Args:
        low, high: temperatures of ordinary and of private tokens.
        noise: scale of the noise on a fully private token's probabilities.
        kind: `"laplace"` or `"gaussian"`.
        alpha: weight of the teacher, in [0, 1].
        gate: labels of tokens that are at least so private are not used.
        squared: multiply the divergence by T squared, as other distillation does; private tokens then pull more.
        seed: of the noise.

    Raises:
        InputError: an argument is out of its range, or the batch brings no privacy, or values outside [0, 1].
        VocabularyError: teacher and student count different classes.

    Source: Li, Wu, Dong, Wu, Bian & Xiong, 2022, arXiv:2212.08349. Only its abstract could be read; the
    equations and the defaults are this library's.
    """

    card = Card(
        paper="Li, Wu, Dong, Wu, Bian & Xiong, 2022",
        arxiv="2212.08349",
        sheet=54,
        carries="outputs",
        teacher="full",
        data="unlabelled",
        tasks=("language-model",),
    )

    def __init__(
        self,
        low: float = 1.0,
        high: float = 10.0,
        noise: float = 0.01,
        kind: Literal["laplace", "gaussian"] = "laplace",
        alpha: float = 0.5,
        gate: float = 0.5,
        squared: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if not 0 < low <= high:
            raise InputError(f"Swing: low and high are {low} and {high}: 0 < low <= high is needed")
        if noise < 0 or kind not in ("laplace", "gaussian"):
            raise InputError(f"Swing: noise is {noise} ({kind!r}); it must not be negative, laplace or gaussian")
        if not (0 <= alpha <= 1 and 0 <= gate <= 1):
            raise InputError(f"Swing: alpha is {alpha} and gate {gate}, both must be in [0, 1]")
        self.low, self.high, self.noise, self.kind = low, high, noise, kind
        self.alpha, self.gate, self.squared, self.seed = alpha, gate, squared, seed

    def build(self, student: Outputs, teacher: Outputs) -> None:
        same_classes(student.scores, teacher.scores)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        mask, private = self._private(batch)
        ours = student.logits_at(mask)
        temperature = self.low + (self.high - self.low) * private[:, None]
        target = self._noisy((teacher.logits_at(mask) / temperature).softmax(-1), private, mask, batch)
        log_s = (ours / temperature).log_softmax(-1)
        values = (torch.special.xlogy(target, target) - target * log_s.clamp(min=-1e30)).sum(-1)
        if self.squared:
            values = values * temperature[:, 0] ** 2
        count = float(len(ours))
        terms = {"swing": self.alpha * Term(values.sum(), count, "token")}
        if self.alpha < 1 and batch.labels is not None:
            hard = torch.where(private < self.gate, cross_entropy(ours, batch.labels[mask]), 0.0)
            terms["labels"] = (1 - self.alpha) * Term(hard.sum(), count, "token")
        return terms

    def _private(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mask, and how private the token is that each scored position predicts, `(rows,)`."""
        if "privacy" not in batch or batch.mask is None:
            raise InputError("Swing needs 'privacy' in each batch, (batch, tokens): how private each token is, 0 to 1")
        scores = batch["privacy"].float()
        if scores.shape != batch.mask.shape or not bool(((scores >= 0) & (scores <= 1)).all()):
            raise InputError(
                f"'privacy' has shape {tuple(scores.shape)} with values from {float(scores.min()):.3g} to "
                f"{float(scores.max()):.3g}: expected {tuple(batch.mask.shape)}, each in [0, 1]"
            )
        return batch.mask, torch.nn.functional.pad(scores[:, 1:], (0, 1))[batch.mask]

    @torch.no_grad()
    def _noisy(self, p: Tensor, private: Tensor, mask: Tensor, batch: Batch) -> Tensor:
        """The targets that are given out."""
        if self.noise == 0:
            return p
        drawn = []
        for number, count in enumerate(mask.sum(1).tolist()):
            sample = number if batch.index is None else int(batch.index[number])
            draw = torch.Generator().manual_seed(rng.derive(self.seed, "swing", sample))
            if self.kind == "gaussian":
                drawn.append(torch.randn(count, p.shape[-1], generator=draw))
            else:
                uniform = torch.rand(count, p.shape[-1], generator=draw) - 0.5
                drawn.append(-uniform.sign() * torch.log1p(-2 * uniform.abs().clamp(max=0.5 - SMALLEST)))
        noisy = p + self.noise * private[:, None] * torch.cat(drawn).to(p)
        noisy = noisy.clamp(min=SMALLEST)
        return torch.where(private[:, None] > 0, noisy / noisy.sum(-1, keepdim=True), p)


def exposure_scores(teacher_loss: Tensor, public_loss: Tensor, slope: float = 2.0, margin: float = 2.0) -> Tensor:
    """How private tokens look: high where a teacher knows what a public model does not.

        u = sigmoid(slope * (public_loss - teacher_loss - margin))

    Args:
        teacher_loss, public_loss: nats of each token, of one shape.
    """
    return torch.sigmoid(slope * (public_loss - teacher_loss - margin))


def rule_scores(text: str, ends: Sequence[int], patterns: Sequence[str] = PATTERNS) -> Tensor:
    """1 for the tokens of a text that touch a match of a pattern, 0 for others, `(tokens,)`.

    Args:
        ends: of each token, the number of characters of the text up to its end.
        patterns: regular expressions; by default e-mail addresses and runs of two or more digits.
    """
    found = torch.zeros(len(ends))
    spans = [match.span() for pattern in patterns for match in re.finditer(pattern, text)]
    for i, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        found[i] = any(a < end and start < b for a, b in spans)
    return found


def tagger_scores(logits: Tensor, private: Sequence[int]) -> Tensor:
    """The probability that a token tagger gives to its private classes, `(batch, tokens)`.

    Args:
        logits: of the tagger, `(batch, tokens, classes)`, line by line with the text's tokens.
        private: numbers of the private classes.

    Raises:
        InputError: the tagger has no such class.
    """
    if not private or not all(0 <= c < logits.shape[-1] for c in private):
        raise InputError(f"private classes are {list(private)}, the tagger has {logits.shape[-1]} classes")
    return logits.float().softmax(-1)[..., list(private)].sum(-1)

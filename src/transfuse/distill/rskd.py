"""RS-KD: distillation from tokens drawn from the teacher."""

from __future__ import annotations

import torch

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.core.store.forms import Draws, draw_tokens
from transfuse.core.teacher import same_classes
from transfuse.core.teaching import teach
from transfuse.distill.base import Distillation
from transfuse.losses import Divergence, Projection, Sampled
from transfuse.losses.scores import in_parts

CHUNK = 256


class RSKD(Distillation):
    """Match tokens drawn at random from the teacher, an unbiased and tiny record of what it says.

        loss = (1 - alpha) * CE(labels, student) + alpha * sum_i s_i * (log s_i - log student_i)

    with s_i = c_i / draws, where token i came c_i times in `draws` draws with replacement from the teacher. The
    expectation of s is the teacher, so that of the gradient is the gradient of KL(teacher || student); the value is
    not comparable with that KL, for s has less entropy.

    The source is usually a :class:`~transfuse.core.store.TeacherStore` of `Draws`, built once: about twelve distinct
    tokens and 37 bytes per position replace a vocabulary of logits. From a live teacher it draws anew in every step.

    Args:
        draws: per position, from a live teacher; a store has its own number.
        alpha: weight of the teacher, in [0, 1]; 1 uses no labels.

    Raises:
        InputError: an argument is out of its range.
        VocabularyError: teacher and student count different classes.

    Source: Anshumann, Zaidi, Kedia, Ahn, Kwon, Lee, Lee & Lee, ACL 2025, arXiv:2503.16870.
    """

    card = Card(
        paper="Anshumann, Zaidi, Kedia, Ahn, Kwon, Lee, Lee & Lee, ACL 2025",
        arxiv="2503.16870",
        sheet=57,
        carries="outputs",
        teacher="sampled",
        also=("full",),
        data="unlabelled",
        tasks=("classification", "language-model", "token-classification"),
    )

    def __init__(self, draws: int = 50, alpha: float = 1.0):
        super().__init__()
        Draws(draws)  # the same range
        if not 0 <= alpha <= 1:
            raise InputError(f"RSKD: alpha is {alpha}, it must be between 0 (labels only) and 1 (teacher only)")
        self.draws, self.alpha = draws, alpha

    def build(self, student: Outputs, teacher: Outputs) -> None:
        same_classes(student.scores, teacher.scores)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        drawn = teacher.scores if isinstance(teacher.scores, Sampled) else self._draw(teacher, batch)
        temperature = drawn.temperature
        return teach("rskd", Divergence("forward", temperature=temperature), student, Outputs(drawn), batch, self.alpha)

    @torch.no_grad()
    def _draw(self, teacher: Outputs, batch: Batch) -> Sampled:
        """Draws from a live teacher, at the positions that count."""
        scores = teacher.learning
        device = scores.hidden.device if isinstance(scores, Projection) else scores.device
        mask = torch.ones(scores.shape[:-1], dtype=torch.bool, device=device) if batch.mask is None else batch.mask
        seed = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        ids = torch.zeros(*mask.shape, self.draws, dtype=torch.long, device=device)
        parts = in_parts(scores, CHUNK, mask)
        drawn = [draw_tokens(logits.float().cpu(), self.draws, seed) for logits in parts]
        counts = torch.zeros_like(ids)
        if drawn:
            ids[mask] = torch.cat(drawn).sort(-1).values.to(ids.device)
            equal = ids[mask][:, :, None] == ids[mask][:, None, :]
            counts[mask] = equal.sum(-1) * (equal.tril(-1).sum(-1) == 0)  # the first of equal ones stands for all
        return Sampled(ids, counts, scores.shape[-1])

"""TinyViT: pre-training on sparse soft labels that were stored with the seeds of their views."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.distill.base import Distillation
from transfuse.losses import Term


class TinyViT(Distillation):
    """Learn a teacher's stored answers about augmented images; the teacher is never loaded.

        p_c = stored value of class c among the K kept,  (1 - sum of the kept) / (C - K) for each other class
        loss = -sum_c p_c log student_c

    The data is `store.dataset(images)` of a :class:`~transfuse.core.store.ViewStore`: each sample is the view that
    the teacher saw, made again from its seed, with what the teacher said. Views of several epochs stand in a row, so
    an epoch over this data shows each of them once; `store.dataset(images, mixup=0.8)` mixes them. No labels are
    used. The target is biased, since the rest is spread evenly; RS-KD's draws are not.

    Raises:
        InputError: the data has no stored answers, or the target has fewer classes than were kept.

    Source: Wu, Zhang, Peng, Liu, Xiao, Fu & Yuan, ECCV 2022, arXiv:2207.10666.
    """

    card = Card(
        paper="Wu, Zhang, Peng, Liu, Xiao, Fu & Yuan, ECCV 2022",
        arxiv="2207.10666",
        sheet=139,
        carries="outputs",
        teacher="none",
        data="unlabelled",
        tasks=("classification",),
    )
    uses_source = False

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        if "values" not in batch or "ids" not in batch:
            raise InputError("TinyViT learns stored answers, which this data has none of: pass store.dataset(images)")
        logits, values = student.logits, batch["values"]
        if batch["ids"].shape[-1] >= logits.shape[-1]:
            raise InputError(f"{batch['ids'].shape[-1]} classes were kept, the target has {logits.shape[-1]}")
        losses = stored_cross_entropy(logits, batch["ids"], values)
        if "share" in batch:  # of mixed views, whose target is mixed as they are
            other = stored_cross_entropy(logits, batch["other_ids"], batch["other_values"])
            losses = torch.lerp(other, losses, batch["share"])
        return {"stored": Term.of(losses)}


def stored_cross_entropy(logits: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """Cross-entropy to kept probabilities and an even rest, `(batch,)`; the target is never made dense.

    Args:
        logits: `(batch, classes)`.
        ids, values: the kept classes and their probabilities, `(batch, k)`; half precision may make their sum exceed 1.
    """
    log_s = logits.float().log_softmax(-1)
    kept = log_s.gather(-1, ids)
    rest = (1 - values.sum(-1)).clamp(min=0) / (logits.shape[-1] - ids.shape[-1])
    return -(torch.where(values > 0, values * kept, 0)).sum(-1) - rest * (log_s.sum(-1) - kept.sum(-1))

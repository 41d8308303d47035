"""ByteSpanKD: teacher and student with different tokenizers agree on the likelihood of the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from transfuse.core.batch import Batch, real_tokens, token_ids
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.distill.base import Distillation
from transfuse.losses import IGNORE, Term
from transfuse.losses.alignment import Spans, align_spans, binary_kl
from transfuse.losses.match import label_entropy
from transfuse.losses.reduction import next_token


class ByteSpanKD(Distillation):
    """Match the teacher's likelihood of each chunk of bytes, whatever tokens either side makes of it.

        loss = (1 - alpha) * CE(labels, student) + alpha * T * KL_2(p ** (1/T), q ** (1/T))
        KL_2(p, q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q))

    A chunk is the shortest run of bytes that begins and ends at a token boundary of both sides; p and q are the
    products of its tokens' probabilities, given everything before it, under the teacher and under the student. The mean
    is over chunks. The first token of a text has no probability, so neither has the chunk it lies in, unless a special
    token stands before it.

    Batches hold both readings of the text, see :func:`transfuse.datasets.paired_tokens`; without a `source` both
    sides read the same tokens, and each is a chunk. The factor T is not in the paper, which scales by the gradient:
    with it, the size of the gradient does not depend on T. Left out are the paper's hidden states and its threshold
    on how likely a chunk is to end where it ends.

    Args:
        temperature: T > 0; the higher, the more chunks of many bytes count, whose likelihood is near 0.
        alpha: weight of the teacher, in [0, 1]; 1 uses no labels.

    Raises:
        InputError: an argument is out of its range, or a batch has no byte positions for its two readings.

    Source: Minixhofer, Vulić & Ponti, NeurIPS 2025, arXiv:2503.20083 (approximate likelihood matching).
    """

    card = Card(
        paper="Minixhofer, Vulić & Ponti, NeurIPS 2025",
        arxiv="2503.20083",
        carries="outputs",
        teacher="full",
        data="unlabelled",
        tasks=("language-model",),
    )
    reads_apart = True
    units: Mapping[str, Callable[[Batch], float | Tensor]] = {"chunk": lambda batch: spans(batch).valid.sum()}

    def __init__(self, temperature: float = 100.0, alpha: float = 1.0):
        super().__init__()
        if not temperature > 0:
            raise InputError(f"ByteSpanKD: temperature is {temperature}, it must be positive")
        if not 0 <= alpha <= 1:
            raise InputError(f"ByteSpanKD: alpha is {alpha}, it must be between 0 (labels only) and 1 (teacher only)")
        self.temperature, self.alpha = temperature, alpha

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        chunks = spans(batch)
        ours = torch.where(batch.mask, next_token(token_ids(batch)), IGNORE)
        theirs = next_token(torch.where(real_tokens(batch.for_source()), token_ids(batch.for_source()), IGNORE))
        # What position t says is about token t + 1; the first token has nothing that speaks about it.
        q = chunks.sum(_of_token(-label_entropy(student.learning, ours)), chunks.student)
        with torch.no_grad():
            p = chunks.sum(_of_token(-label_entropy(teacher.learning, theirs)), chunks.teacher)
        terms = {"spans": self.alpha * Term.of(binary_kl(q, p, self.temperature), chunks.valid, "chunk")}
        if self.alpha < 1:
            entropy = label_entropy(student.learning, batch.labels)
            terms["labels"] = (1 - self.alpha) * Term.of(entropy, batch.labels != IGNORE, "labelled")
        return terms


def spans(batch: Batch) -> Spans:
    """The chunks of a batch whose mask lines up with the logits.

    Raises:
        InputError: there are two readings of the text, and no byte positions that could line them up; or no text.
    """
    scored = scored_tokens(batch)
    other = batch.for_source()
    masks = real_tokens(batch), real_tokens(other)
    if other is batch:
        ends = [mask.long().cumsum(1) for mask in masks]
    elif "ends" in batch and "source_ends" in batch:
        ends = [batch["ends"], batch["source_ends"]]
    else:
        raise InputError(
            "ByteSpanKD needs the byte after each token, as `ends` and `source_ends`, where the source has its own "
            f"tokens; this batch has {', '.join(batch)}. transfuse.datasets.paired_tokens makes them"
        )
    return align_spans(ends[0], _of_token(scored), ends[1], _of_token(next_token(masks[1].long()) == 1))


def scored_tokens(batch: Batch) -> Tensor:
    """Which positions say something about a token that counts, `(batch, tokens)`.

    Raises:
        InputError: the task is not that of a language model.
    """
    if batch.mask is None or batch.mask.shape != token_ids(batch).shape:
        raise InputError("text is read here, and this is another task: pass task='language-model', or use KD")
    return batch.mask


def _of_token(values: Tensor) -> Tensor:
    """What stands at position t moved to the token t + 1 that it is about; 0 for the first token."""
    return torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], 1)

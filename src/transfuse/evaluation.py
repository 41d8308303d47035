"""A model on held-out data, reduced to what reports need: one value per sample, and logits where they are small."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch, line_up
from transfuse.core.errors import InputError
from transfuse.core.outputs import call, eager, find_logits, modes_kept
from transfuse.core.streams import Data, Draw
from transfuse.losses import IGNORE, classes_last, cross_entropy, kl_divergence
from transfuse.measure import agreement, correct, expected_calibration_error, held_out_kl, negative_log_likelihood

HIGHER_IS_BETTER = {"accuracy": True, "agreement": True, "nll": False}


@dataclass(frozen=True)
class Evaluation:
    """What one model did on held-out data.

    Attributes:
        values: for each metric, one value per sample, `(samples,)`; their mean is the metric. Accuracy, agreement
            with the source (same top class), kl (source to target) and nll in nats per sample or token.
        logits, labels: `(samples, classes)` and `(samples,)` in classification, else None.
    """

    values: dict[str, Tensor]
    logits: Tensor | None = None
    labels: Tensor | None = field(default=None)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Every metric as one number, with the expected calibration error (ece) in classification."""
        found = {name: float(value.double().mean()) for name, value in self.values.items()}
        if self.logits is not None and self.labels is not None:
            found["ece"] = expected_calibration_error(self.logits, self.labels)
        return found

    def state(self) -> dict[str, Any]:
        """As tensors, for keeping on disk."""
        return {"values": self.values, "logits": self.logits, "labels": self.labels}


def main_metric(task: str, labelled: bool) -> str:
    """What a comparison is about: nll for language models, accuracy elsewhere, agreement where no labels exist."""
    if task == "language-model":
        return "nll"
    return "accuracy" if labelled else "agreement"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Data,
    *,
    task: str,
    batch_size: int,
    source: nn.Module | None = None,
    reference: Evaluation | None = None,
) -> Evaluation:
    """Run a model over held-out data in eval mode, with the same label alignment and losses as in training.

    Args:
        source: compared with batch by batch, where logits are too many to keep (tokens, pixels).
        reference: the source's own evaluation in classification, so that it runs once for all comparisons.

    Raises:
        InputError: the data holds nothing to score.
    """
    models = [m for m in (model, source) if m is not None]  # a compiled model has no truth value
    with modes_kept(*models):
        for m in models:
            m.eval()
        device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        batches = (
            line_up(batch, task)
            for micro in data.epoch(Draw(batch_size, None, shuffle=False, seed=0), 0)
            for batch in micro
        )
        if task == "classification":
            return _classification(model, batches, device, reference)
        return _dense(model, batches, device, source, task)


def _classification(model: nn.Module, batches: Any, device: torch.device, reference: Evaluation | None) -> Evaluation:
    logits, labels = [], []
    for batch in batches:
        logits.append(find_logits(call(eager(model), batch.to(device).inputs)).float().cpu())
        if batch.labels is not None:
            labels.append(batch.labels)
    scores, truth = torch.cat(logits), torch.cat(labels) if labels else None
    if truth is not None and (truth == IGNORE).all():
        truth = None
    known = slice(None) if truth is None else truth != IGNORE
    scores, truth = scores[known], None if truth is None else truth[known]
    values = {}
    if truth is not None:
        values = {"accuracy": correct(scores, truth), "nll": negative_log_likelihood(scores, truth)}
    if reference is not None and reference.logits is not None and reference.logits.shape == scores.shape:
        values["agreement"] = agreement(scores, reference.logits)
        values["kl"] = held_out_kl(scores, reference.logits)
    return Evaluation(values, scores, truth)


def _dense(model: nn.Module, batches: Any, device: torch.device, source: nn.Module | None, task: str) -> Evaluation:
    """Token- or pixel-wise tasks: sums per sample, never the logits of more than one batch."""
    sums: dict[str, list[Tensor]] = {}
    counts: list[Tensor] = []
    for cpu_batch in batches:
        batch: Batch = cpu_batch.to(device)
        logits = find_logits(call(eager(model), batch.inputs)).float()
        positions = {} if batch.labels is None else {"nll": cross_entropy(logits, batch.labels)}
        if batch.labels is not None and task != "language-model":
            positions["accuracy"] = (classes_last(logits).argmax(-1) == batch.labels).float()
        if source is not None:
            theirs = find_logits(call(eager(source), batch.inputs)).float()
            positions["kl"] = kl_divergence(logits, theirs)
            positions["agreement"] = (classes_last(logits).argmax(-1) == classes_last(theirs).argmax(-1)).float()
        if not positions:
            raise InputError("held-out data without labels needs a source to compare with")
        first = next(iter(positions.values()))
        mask = torch.ones_like(first, dtype=torch.bool) if batch.mask is None else batch.mask
        counts.append(mask.flatten(1).sum(1).double().cpu())
        for name, value in positions.items():
            sums.setdefault(name, []).append(torch.where(mask, value, 0).flatten(1).double().sum(1).cpu())
    count = torch.cat(counts)
    if not count.sum():
        raise InputError("the held-out data has no position to score: every label or mask is empty")
    # Scaled so that the mean over samples is the mean over tokens: long samples weigh what they are.
    scale = len(count) / count.sum()
    return Evaluation({name: torch.cat(parts) * scale for name, parts in sums.items()})

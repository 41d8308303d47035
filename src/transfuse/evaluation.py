"""A model on held-out data, reduced to what reports need: one value per sample, and logits where they are small."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch, line_up
from transfuse.core.errors import InputError
from transfuse.core.output_layer import find_output_layer, left_out
from transfuse.core.outputs import call, eager, find_logits, modes_kept
from transfuse.core.placement import device_of
from transfuse.core.streams import Data, Draw
from transfuse.core.vocabulary import common_classes
from transfuse.losses import IGNORE, Projection, Scores, classes_last, cross_entropy, kl_divergence, next_token
from transfuse.losses.scores import in_parts
from transfuse.measure import agreement, correct, expected_calibration_error, held_out_kl, negative_log_likelihood

CHUNK = 256
"""Positions of a language model whose logits exist at a time."""
HIGHER_IS_BETTER = {"accuracy": True, "agreement": True, "nll": False, "bits_per_byte": False}


@dataclass(frozen=True)
class Evaluation:
    """What one model did on held-out data.

    Attributes:
        values: for each metric, one value per sample, `(samples,)`; their mean is the metric. Accuracy, agreement
            with the source (same top class), kl (source to target) and nll in nats per sample or token; bits_per_byte
            of text whose tokens' `bytes` are known.
        logits, labels: `(samples, classes)` and `(samples,)` in classification, else None.
        sets: names of the held-out sets, where there are several; `of_set` says of which each sample is.
        counts: `(samples,)` scored positions of each sample in token- and pixel-wise tasks, else None.
    """

    values: dict[str, Tensor]
    logits: Tensor | None = None
    labels: Tensor | None = field(default=None)
    sets: tuple[str, ...] = ()
    of_set: Tensor | None = None
    counts: Tensor | None = None

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Every metric as one number, with the expected calibration error (ece) in classification."""
        found = {name: float(value.double().mean()) for name, value in self.values.items()}
        if self.logits is not None and self.labels is not None:
            found["ece"] = expected_calibration_error(self.logits, self.labels)
        return found

    def by_set(self, metric: str) -> dict[str, float]:
        """A metric on each of several held-out sets; empty where there is one."""
        if self.of_set is None:
            return {}
        value = self.values[metric].double()
        if self.counts is not None:  # back from the mean over all positions to sums over a sample's
            value = value * self.counts.sum() / len(value)
        weight = torch.ones_like(value) if self.counts is None else self.counts
        members = {name: self.of_set == number for number, name in enumerate(self.sets)}
        return {name: float(value[m].sum() / weight[m].sum()) for name, m in members.items() if weight[m].sum()}

    def state(self) -> dict[str, Any]:
        """As tensors, for keeping on disk."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


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
    is_correct: Callable[[Tensor, Tensor], Tensor] = correct,
) -> Evaluation:
    """Run a model over held-out data in eval mode, with the same label alignment and losses as in training.

    Args:
        source: compared with batch by batch, where logits are too many to keep (tokens, pixels).
        reference: the source's own evaluation in classification, so that it runs once for all comparisons.
        is_correct: whether each sample's logits answer its label, all samples at once; top-1 by default.

    Raises:
        InputError: the data holds nothing to score.
    """
    models = [m for m in (model, source) if m is not None]  # a compiled model has no truth value
    with modes_kept(*models):
        for m in models:
            m.eval()
        device = device_of(model)
        batches = (
            line_up(batch, task)
            for micro in data.epoch(Draw(batch_size, None, shuffle=False, seed=0), 0)
            for batch in micro
        )
        if task == "classification":
            found = _classification(model, batches, device, reference, is_correct)
        else:
            found = _dense(model, batches, device, source, task)
    return found if found.of_set is None else replace(found, sets=tuple(getattr(data, "names", ())))


def _classification(
    model: nn.Module,
    batches: Any,
    device: torch.device,
    reference: Evaluation | None,
    is_correct: Callable[[Tensor, Tensor], Tensor],
) -> Evaluation:
    logits, labels, tasks = [], [], []
    for batch in batches:
        logits.append(find_logits(call(eager(model), batch.to(device).inputs, task=batch.task)).float().cpu())
        if batch.labels is not None:
            labels.append(batch.labels)
        if batch.task is not None:
            tasks.append(batch.task)
    scores, truth = torch.cat(logits), torch.cat(labels) if labels else None
    of_set = torch.cat(tasks) if tasks else None
    if truth is not None and (truth == IGNORE).all():
        truth = None
    known = slice(None) if truth is None else truth != IGNORE
    scores, truth = scores[known], None if truth is None else truth[known]
    of_set = None if of_set is None else of_set[known]
    values = {}
    if truth is not None:
        values = {"accuracy": is_correct(scores, truth).float()}
        if is_correct is correct or bool((values["accuracy"] == (scores.argmax(1) == truth)).all()):
            values["nll"] = negative_log_likelihood(scores, truth)
        else:  # classes are matched, or unseen: the logit of a label's number is not that label's
            return Evaluation(values, of_set=of_set)
    if reference is not None and reference.logits is not None and reference.logits.shape == scores.shape:
        values["agreement"] = agreement(scores, reference.logits)
        values["kl"] = held_out_kl(scores, reference.logits)
    return Evaluation(values, scores, truth, of_set=of_set)


def _dense(model: nn.Module, batches: Any, device: torch.device, source: nn.Module | None, task: str) -> Evaluation:
    """Token- or pixel-wise tasks: sums per sample, never the logits of more than one batch."""
    sums: dict[str, list[Tensor]] = {}
    counts: list[Tensor] = []
    sizes: list[Tensor] = []
    tasks: list[Tensor] = []
    layers: dict[int, nn.Linear | None] = {}
    for cpu_batch in batches:
        batch: Batch = cpu_batch.to(device)
        if batch.task is not None:
            tasks.append(cpu_batch.task)
        ours = _scores(model, batch, layers, task)
        theirs = None if source is None else _scores(source, Batch(batch, task=None), layers, task)
        if task == "language-model":
            common = None if source is None or theirs is None else _common(model, source, ours, theirs)
            positions = _by_chunk(ours, theirs, batch.labels, common)
        else:
            assert isinstance(ours, Tensor)
            assert not isinstance(theirs, Projection)
            positions = _compared(ours, theirs, batch.labels)
            if batch.labels is not None:
                positions["accuracy"] = (classes_last(ours).argmax(-1) == batch.labels).float()
        if not positions:
            raise InputError("held-out data without labels needs a source to compare with")
        first = next(iter(positions.values()))
        mask = torch.ones_like(first, dtype=torch.bool) if batch.mask is None else batch.mask
        counts.append(mask.flatten(1).sum(1).double().cpu())
        if task == "language-model" and "bytes" in batch:  # of each token, which is scored one position earlier
            sizes.append(torch.where(mask, next_token(batch["bytes"]), 0).sum(1).double().cpu())
        for name, value in positions.items():
            sums.setdefault(name, []).append(torch.where(mask, value, 0).flatten(1).double().sum(1).cpu())
    count = torch.cat(counts)
    if not count.sum():
        raise InputError("the held-out data has no position to score: every label or mask is empty")
    # Scaled so that the mean over samples is the mean over tokens: long samples weigh what they are.
    scale = len(count) / count.sum()
    values = {name: torch.cat(parts) * scale for name, parts in sums.items()}
    if sizes:
        size = torch.cat(sizes)
        values["bits_per_byte"] = torch.cat(sums["nll"]) / math.log(2) * (len(size) / size.sum())
    return Evaluation(values, of_set=torch.cat(tasks) if tasks else None, counts=count)


def _scores(model: nn.Module, batch: Batch, layers: dict[int, nn.Linear | None], task: str) -> Scores:
    """What a model says about a batch; a language model's logits are left to be computed, a few rows at a time."""
    if task == "language-model" and id(model) not in layers:
        layers[id(model)] = find_output_layer(model, batch.inputs)
    with left_out(layers.get(id(model))) as projections:
        raw = call(eager(model), batch.inputs, task=batch.task)
    return projections[-1] if projections else find_logits(raw).float()


def _common(model: nn.Module, source: nn.Module, ours: Scores, theirs: Scores) -> int:
    """How many classes both know."""
    if ours.shape[-1] == theirs.shape[-1]:
        return ours.shape[-1]
    return common_classes(model, source, ours.shape[-1], theirs.shape[-1])


def _by_chunk(ours: Scores, theirs: Scores | None, labels: Tensor | None, common: int | None) -> dict[str, Tensor]:
    """The values of every position, `(batch, tokens)`, from the logits of some rows at a time."""
    shape = ours.shape[:-1]
    answers = repeat(None) if labels is None else labels.flatten().split(CHUNK)
    others = repeat(None) if theirs is None else (part.float()[:, :common] for part in in_parts(theirs, CHUNK))
    # The first ends with the positions; what is repeated never does.
    compared = zip(in_parts(ours, CHUNK), others, answers, strict=False)
    parts = [_compared(part.float(), other, answer, common) for part, other, answer in compared]
    return {name: torch.cat([part[name] for part in parts]).view(shape) for name in parts[0]}


def _compared(
    ours: Tensor, theirs: Tensor | None, labels: Tensor | None, common: int | None = None
) -> dict[str, Tensor]:
    """Of logits: NLL of labels over all classes, and what both have in common with the source over the shared ones."""
    found = {} if labels is None else {"nll": cross_entropy(ours, labels)}
    if theirs is not None:
        shared = ours if common is None else ours[..., :common]
        found["kl"] = kl_divergence(shared, theirs)
        found["agreement"] = (classes_last(shared).argmax(-1) == classes_last(theirs).argmax(-1)).float()
    return found

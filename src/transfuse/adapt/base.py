"""The family of domain adaptation: labels of one domain serve another one that has none.

A method of this family is one function, `loss(source, target, source_batch, target_batch, clock)`: what it adds to
the cross-entropy on the source's labels, which is the same for all and stands here.

The caller gives `source=` labelled data, `target=` the model and `data=` the target domain's data. Labels of the
latter are taken away before any method sees a batch, and what needs choosing is chosen by a validator that uses
none (:mod:`transfuse.measure.validators`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.core.batch import Batch, line_up
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, ShapeError, TransferError
from transfuse.core.labels import labels_term
from transfuse.core.method import Method
from transfuse.core.outputs import Features, Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Data, Stream
from transfuse.losses import Term

SAMPLE = 32
"""Samples of each domain that a method is set up with."""


class Adaptation(Method):
    """Base of the family. `"target"` is the model; the streams are `"target"`, without labels, and `"source"`.

    The loss of every method is

        mean CE(source labels, source logits)  +  the terms of `loss`

    so methods that share `loss` add: `DANN() + 0.1 * DAN()` has the cross-entropy once.
    """

    family = "adapt"
    select = "mutual_information"

    def loss(self, source: Outputs, target: Outputs, source_batch: Batch, target_batch: Batch, clock: Clock) -> Losses:
        """The terms beside the source's cross-entropy, from one micro-batch of each domain.

        Units of the source's samples are `"source/sample"` and `"source/labelled"`.
        """
        raise NotImplementedError

    def build(self, source: Outputs, target: Outputs) -> None:
        """Build side modules from the outputs for one real batch of each domain."""

    def losses(self, batches: Batches, run: Run) -> Losses:
        source, target = run_domains(run, batches["source"], batches["target"])
        terms = self.loss(source, target, batches["source"], batches["target"], run.clock)
        return {"labels": source_labels(source.logits, batches["source"]), **terms}

    def setup(self, run: Run, sample: Batch | None) -> None:
        batches = samples(run, type(self).__name__)
        try:
            source, target = run_domains(run, batches["source"], batches["target"])
            source_labels(source.logits, batches["source"])
            self.build(source, target)
        except TransferError:
            raise
        except ValueError as error:
            raise ShapeError(f"{type(self).__name__} cannot use these batches: {error}") from error

    def stage(self, i: int, run: Run) -> Stage:
        return Stage(self.streams(run), [Phase("adapt", self.losses, self.trained(run))], keep="best")

    def streams(self, run: Run) -> dict[str, Stream | Data]:
        """The target's data without its labels, which defines the epoch, and the source's with them."""
        return {"target": run.data["data"].without_labels(), "source": run.data["source"]}

    def trained(self, run: Run) -> list[nn.Parameter]:
        """Everything that moves: the model, and what the method learns on the side."""
        return [*run["target"].parameters(), *self.parameters()]


class SourceOnly(Adaptation):
    """Train on the source's labels and hope: the target domain's data is not looked at.

        loss = CE(source labels, source logits)

    The baseline of every adaptation.
    """

    card = Card(paper="supervised training on the source", carries="nothing", teacher="data", control=True)

    def losses(self, batches: Batches, run: Run) -> Losses:
        return {"labels": source_labels(run("target", batches["source"]).logits, batches["source"])}


def source_labels(logits: Tensor, batch: Batch) -> Term:
    """Cross-entropy on the labels of the stream `"source"`."""
    return labels_term(logits, batch, "source/labelled")


def samples(run: Run, name: str) -> dict[str, Batch]:
    """One real batch of each domain, as losses get them: the target's without labels.

    Raises:
        InputError: the source's data, or its labels, are not there.
    """
    if "data" not in run.data or "source" not in run.data:
        raise InputError(
            f"{name} adapts from labelled source data to target data without labels, found {', '.join(run.data)}: "
            "pass source=(inputs, labels) and data=target_inputs"
        )
    source, target = run.data["source"].sample(SAMPLE), run.data["data"].sample(SAMPLE)
    if source is None or source.labels is None:
        raise InputError(f"{name} learns from the source's labels, and the source data has none: pass (inputs, labels)")
    if target is None:
        raise InputError(f"{name} needs data of the target domain: pass data=target_inputs")
    batches = {"target": target.without_labels(), "source": source}
    return {stream: line_up(batch, run.task).to(run.device) for stream, batch in batches.items()}


def extractor(run: Run, layer: str, name: str) -> list[nn.Parameter]:
    """The model's parameters that the features at a layer depend on."""
    with run.probe():
        batch = samples(run, name)["source"]
        params = [p for p in run["target"].parameters() if p.requires_grad]
        found = torch.autograd.grad(run("target", batch).features[layer].sum(), params, allow_unused=True)
    return [p for p, gradient in zip(params, found, strict=True) if gradient is not None]


def run_domains(run: Run, source: Batch, target: Batch) -> tuple[Outputs, Outputs]:
    """The model's outputs for a batch of each domain, from one forward pass over both.

    So batch normalisation sees the same mixture in training whose running statistics it uses afterwards.

    Raises:
        ShapeError: the inputs of the domains cannot be put into one batch.
    """
    together = run("target", Batch(inputs=_joined(source.inputs, target.inputs)))
    return _rows(together, slice(source.size)), _rows(together, slice(source.size, None))


def _rows(outputs: Outputs, rows: slice) -> Outputs:
    def cut(feature: Any) -> Any:
        return [f[rows] for f in feature] if isinstance(feature, list) else feature[rows]

    return Outputs(outputs.logits[rows], Features({name: cut(f) for name, f in outputs.features.items()}))


def _joined(source: Any, target: Any) -> Any:
    """Inputs one below the other; token sequences are padded to one length, which their attention mask tells."""
    names = [list(x) if isinstance(x, Mapping) else None for x in (source, target)]
    if names[0] != names[1]:
        raise ShapeError(f"inputs of the source are named {names[0]}, those of the target {names[1]}: name them alike")
    if isinstance(source, Mapping):
        if "attention_mask" in source:
            length = max(x["attention_mask"].shape[1] for x in (source, target))
            source, target = ({k: F.pad(v, (0, length - v.shape[1])) for k, v in x.items()} for x in (source, target))
        return {name: _joined(source[name], target[name]) for name in source}
    if source.shape[1:] != target.shape[1:]:
        raise ShapeError(
            f"a source sample is {tuple(source.shape[1:])}, a target sample {tuple(target.shape[1:])}: this method "
            "runs one model on both, so bring them to one shape"
        )
    return torch.cat([source, target])

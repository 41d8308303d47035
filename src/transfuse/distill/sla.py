"""SLA: self-supervised label augmentation, and distilling what all views say into one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, ShapeError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.taps import PENULTIMATE, trace_penultimate
from transfuse.distill.base import Distillation
from transfuse.distill.views import Aggregated, Average, Views
from transfuse.losses import IGNORE, Term, cross_entropy, kl_divergence

VARIANTS = ("SLA+SD", "SLA", "DA", "MT")


class SLA(Distillation):
    """Learn which class and which view a picture is, as one label; teach a plain head what all views say together.

        view j of image i, j = 1..M, with the joint label y_i * M + j;  u joint head, s the target's own head
        SLA     = mean over images and views of CE(u(t_j(x_i)), y_i * M + j)
        a_i     = mean over j of u(t_j(x_i))[n * M + j] for every class n, a constant (aggregated logits)
        SLA+SD  = SLA + mean over images of CE(s(x_i), y_i) + T**2 * KL(softmax(a_i / T) || softmax(s(x_i) / T))
        DA      = mean over images and views of CE(s(t_j(x_i)), y_i)
        MT      = DA + mean over images and views of CE(v(t_j(x_i)), j), v a head for the view

    No external teacher: a source is not used. The joint head stands on the target's penultimate layer and is trained
    along. What is deployed is either of the target's own class and sees a picture once: with the head s, or (`"SLA"`)
    with the identity's part of u as its last layer; or a model that sees all M views and averages.

    An update costs M times a plain one: compare per picture seen as well. Batch normalisation comes to know transformed
    pictures; single-view baselines must not reuse its statistics.

    Args:
        variant: one of `"SLA+SD"`, `"SLA"`, and the paper's baselines `"DA"` (every view has its image's label) and
            `"MT"` (two tasks).
        rotations: degrees, counter-clockwise.
        colours: orders of the channels, such as `["RGB", "GBR", "BRG"]`; every rotation is combined with every one.
        temperature: T > 0 of the self-distillation.
        large_loss: sum over views instead of averaging in SLA, as the authors advise for ImageNet.
        inference: `"single"`, or `"aggregated"` (with a joint head only).
        average: what `"aggregated"` averages, `"logits"` as released or `"probabilities"`.

    Raises:
        InputError: views that are equal or have no identity, images that cannot be transformed so, or no labels.
        LayerError: the target does not end in a linear layer.

    Source: Lee, Hwang & Shin, ICML 2020, arXiv:1910.05872.
    """

    card = Card(
        paper="Lee, Hwang & Shin, ICML 2020",
        arxiv="1910.05872",
        sheet=136,
        carries="outputs",
        teacher="none",
        data="labelled",
    )
    uses_source = False

    def __init__(
        self,
        variant: Literal["SLA+SD", "SLA", "DA", "MT"] = "SLA+SD",
        rotations: Sequence[int] = (0, 90, 180, 270),
        colours: Sequence[str] = ("RGB",),
        temperature: float = 1.0,
        large_loss: bool = False,
        inference: Literal["single", "aggregated"] = "single",
        average: Average = "logits",
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise InputError(f"SLA: variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
        if temperature <= 0:
            raise InputError(f"SLA: temperature is {temperature}, it must be positive")
        if inference not in ("single", "aggregated"):
            raise InputError(f"SLA: inference is {inference!r}, expected 'single' or 'aggregated'")
        if average not in ("logits", "probabilities"):
            raise InputError(f"SLA: average is {average!r}, expected 'logits' or 'probabilities'")
        if inference == "aggregated" and not variant.startswith("SLA"):
            raise InputError(f"SLA: the variant {variant!r} has no joint head whose views could be aggregated")
        self.variant, self.rotations, self.colours = variant, rotations, colours
        self.temperature, self.large_loss, self.inference, self.average = temperature, large_loss, inference, average
        self.views = Views(rotations, colours)
        self.head: nn.Linear | None = None
        self._last = ""

    def wants(self) -> dict[str, list[str]]:
        return {"target": [PENULTIMATE]}

    def setup(self, run: Run, sample: Batch | None) -> None:
        if sample is None or sample.labels is None or sample.labels.dim() != 1:
            raise InputError("SLA needs images with one label each, this data has none")
        if not isinstance(sample.inputs, Tensor):
            raise InputError("SLA transforms images: the inputs must be one tensor (batch, channels, height, width)")
        try:
            same = self.views.same(sample.inputs)
        except ValueError as error:
            raise ShapeError(f"SLA cannot use these images: {error}") from error
        for one, other in same:
            run.watch.say(
                f"equal views: {one}, {other}",
                f"the views {one} and {other} of a whole batch are equal, so telling them apart can only be guessed. "
                "Do the pictures have colours, and an upper side? Leave one of the views out",
            )
        outputs = run("target", sample, grad=False)
        feature, classes = outputs.features[PENULTIMATE], outputs.logits.shape[1]
        self._last = trace_penultimate(run["target"], sample.inputs).removesuffix(":input")
        last = run["target"].get_submodule(self._last)
        if feature.dim() != 2 or not torch.allclose(last(feature).float(), outputs.logits, rtol=0.02, atol=0.02):
            raise InputError(f"SLA needs a target whose last layer {self._last!r} gives the logits as they are")
        outs = {"SLA+SD": classes * len(self.views), "SLA": classes * len(self.views), "MT": len(self.views)}
        self.head = nn.Linear(feature.shape[1], outs[self.variant]) if self.variant in outs else None

    def stage(self, i: int, run: Run) -> Stage:
        stage = super().stage(i, run)
        if self.variant == "SLA":
            replaced = set(run["target"].get_submodule(self._last).parameters())  # by the joint head, in `deploy`
            kept = [p for p in stage.trained[0].params if p not in replaced]
            stage.phases = [Phase("student", self.losses, kept)]
        return stage

    def losses(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        expanded = Batch(batch, inputs=self.views(batch.inputs))
        return self.loss(run("target", expanded), Outputs(None), batch, run.clock)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        """`student` are the outputs for every view of the batch."""
        labels, m = batch.labels, len(self.views)
        labelled = labels != IGNORE

        def over_views(logits: Tensor, classes: Tensor) -> Term:
            return Term.of(cross_entropy(logits, classes).view(-1, m).mean(1), labelled, "labelled")

        if self.variant in ("DA", "MT"):
            terms = {"labels": over_views(student.logits, self.views.repeat(labels))}
            if self.head is not None:
                terms["views"] = over_views(self.head(student.features[PENULTIMATE]), self.views.numbers(labels))
            return terms
        assert self.head is not None
        joint = self.head(student.features[PENULTIMATE])
        terms = {"joint": (m if self.large_loss else 1.0) * over_views(joint, self.views.joint(labels))}
        if self.variant == "SLA+SD":
            plain, together = student.logits[self.views.identity :: m], self.views.aggregate(joint.detach())
            terms["labels"] = Term.of(cross_entropy(plain, labels), labelled, "labelled")
            terms["sd"] = Term.of(kl_divergence(plain, together, temperature=self.temperature))
        return terms

    def deploy(self, target: nn.Module) -> nn.Module:
        if self.head is None or (self.inference == "single" and self.variant != "SLA"):
            return target
        model = copy.deepcopy(target)
        weight, bias = self.head.weight.detach(), self.head.bias.detach()
        if self.inference == "single":
            weight, bias = self.views.single(weight.T).T, self.views.single(bias)
        last = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            last.weight.copy_(weight)
            last.bias.copy_(bias)
        parent, _, name = self._last.rpartition(".")
        setattr(model.get_submodule(parent), name, last)
        return model if self.inference == "single" else Aggregated(model, self.views, self.average)

"""WCoRD: student and teacher features of the same image belong together, under a critic that cannot grow."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, nearest
from transfuse.core.labels import labels_term
from transfuse.core.memory import Memory, Others
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses, Phase
from transfuse.core.run import Run
from transfuse.core.streams import Indexed
from transfuse.distill.base import Distillation
from transfuse.losses import Term, cosine_cost, cut_cost, ipot, nce, sinkhorn
from transfuse.losses.feature import unit

MODES = ("nce", "wasserstein")
SOLVERS = ("ipot", "sinkhorn")
CRD_NEGATIVES = 16384


class WCoRD(Distillation):
    """Tell the teacher's feature of the same image from those of others, and carry each batch onto the teacher's.

        t_i, s_i = unit(g_T(teacher feature)), unit(g_S(student feature)),  g linear with spectral norm 1
        f(t, s)  = <t, s> / tau,  negatives n(i, k) from a memory of past t and s
        global   = the sum over both sides of, here with the student as the anchor, mean over samples:
                   nce:         -log q(f(t_i, s_i)) - sum_k log(1 - q(f(t_n, s_i))),  q(f) = exp(f) / (exp(f) + K / N)
                   wasserstein: mean_k f(t_n, s_i) - f(t_i, s_i)
        local    = min over plans pi with marginals 1 / B of sum_ij pi_ij (1 - <t_i, s_j>),  over the batch
        loss     = labels * CE(labels, student) + global_weight * global + local_weight * local

    The spectral norm makes g Lipschitz with constant 1 and the critic, before its rows get length one, with 1 / tau in
    either feature; it is what separates this from CRD (`lipschitz=False, local_weight=0`). The plan is found without
    gradients. `local` matches sets, not pairs, and is batch-coupled. After each update the memory's rows of the batch
    move half way to the new t and s. Nothing but features is compared: the teacher may have other classes, or see
    another modality of the sample, and with `labels=0` no label is needed.

    Args:
        student, teacher: taps of features; further dimensions are flattened. By default the input of the last linear.
        width: of the embeddings t and s.
        mode: `"nce"` or `"wasserstein"`.
        global_weight, local_weight: 0.8 is CRD's; the other is to be tuned from 0.05 to 0.5.
        labels: weight of the cross-entropy.
        negatives: K, drawn anew for every sample; None takes CRD's 16384, or as many as there are others.
        temperature: tau.
        other_classes: draw negatives from other classes only; the data then needs labels.
        remembered: take the other half of the true pair from the memory as well, as CRD's published code does, so that
            it is as old as the negatives are; else both halves are the current ones.
        calibrate: divide exp(f) by N times its mean over the first batch, as CRD does.
        lipschitz: whether g has spectral norm 1.
        solver: of the plan, `"ipot"` (exact) or `"sinkhorn"` (smoothed, with epsilon 0.05).
        cut: set the cheapest costs to zero, this share of the range between the least and the greatest.

    Raises:
        InputError: an argument is out of range; data is no data set; it has no more samples than negatives; a batch
            has one sample, or one twice.
        LayerError: a tap fits no layer, or several.

    Source: Chen et al., CVPR 2021, arXiv:2012.08674; memory and NCE of CRD, Tian et al., ICLR 2020, arXiv:1910.10699.
    """

    card = Card(
        paper="Chen et al., CVPR 2021",
        arxiv="2012.08674",
        sheet=118,
        carries="features",
        teacher="features",
        data="unlabelled",
        tasks=("classification",),
    )
    ours: Side  # these are built in setup
    theirs: Side
    others: Others
    _ids: Tensor

    def __init__(
        self,
        student: str = "penultimate",
        teacher: str = "penultimate",
        width: int = 128,
        mode: str = "nce",
        global_weight: float = 0.8,
        local_weight: float = 0.1,
        labels: float = 1.0,
        negatives: int | None = None,
        temperature: float = 0.07,
        other_classes: bool = False,
        remembered: bool = False,
        calibrate: bool = False,
        lipschitz: bool = True,
        solver: str = "ipot",
        cut: float = 0.0,
    ):
        super().__init__()
        for name, value, known in (("mode", mode, MODES), ("solver", solver, SOLVERS)):
            if value not in known:
                raise InputError(f"WCoRD: unknown {name} {value!r}: {nearest(value, known)}")
        if mode == "wasserstein" and not lipschitz:
            raise InputError("WCoRD: without the spectral norm the Wasserstein objective has no bound: lipschitz=True")
        if temperature <= 0 or width < 1 or (negatives is not None and negatives < 1):
            raise InputError(
                "WCoRD: temperature, width and negatives must be positive, found "
                f"{temperature}, {width} and {negatives}"
            )
        self.student, self.teacher, self.width, self.mode = student, teacher, width, mode
        self.global_weight, self.local_weight, self.labels = global_weight, local_weight, labels
        self.negatives, self.temperature, self.other_classes = negatives, temperature, other_classes
        self.remembered, self.calibrate, self.lipschitz = remembered, calibrate, lipschitz
        self.solver, self.cut = solver, cut
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, s and t of the micro-batches of this update

    def wants(self) -> dict[str, list[str]]:
        return {"target": [self.student], "source": [self.teacher]}

    def setup(self, run: Run, sample: Batch | None) -> None:
        data = run.data.get("data")
        if not isinstance(data, Indexed):
            raise InputError("WCoRD remembers every sample: pass a data set or tensors as data=..., not made batches")
        if self.negatives is not None and self.negatives >= data.size:
            raise InputError(f"WCoRD: {self.negatives} negatives need more samples than that, found {data.size}")
        self._ids = data.ids
        self.others = Others(data.size, data.all_labels()[self._ids.argsort()] if self.other_classes else None)
        super().setup(run, sample)
        self._seen.clear()

    def build(self, student: Outputs, teacher: Outputs) -> None:
        ours, theirs = student.features[self.student], teacher.features[self.teacher]
        self.ours = Side(ours[0].numel(), self._ids, self.width, self.lipschitz).to(ours.device)
        self.theirs = Side(theirs[0].numel(), self._ids, self.width, self.lipschitz).to(ours.device)
        if self.calibrate:
            self.ours.calibrate(self.theirs(theirs), self.temperature)
            self.theirs.calibrate(self.ours(ours), self.temperature)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        s, t = self.ours(student.features[self.student]), self.theirs(teacher.features[self.teacher])
        if len(s) < 2:
            raise InputError("WCoRD compares the samples of a batch, found one: use larger (micro-)batches")
        rows = self.ours.memory.find(batch.index)
        self._seen.append((rows, s.detach(), t.detach()))
        terms = {}
        if self.global_weight:
            terms["global"] = self.global_weight * Term.of(self._global(s, t, rows))
        if self.local_weight:
            terms["local"] = self.local_weight * Term(self._local(s, t))
        if batch.labels is not None and self.labels:
            terms["labels"] = self.labels * labels_term(student.logits, batch)
        return terms

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        rows, s, t = (run.sync.gather(torch.cat(parts)) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        self.ours.advance(rows, s)
        self.theirs.advance(rows, t)

    def _global(self, s: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """`(batch,)`, both sides as anchors, each against the other's memory."""
        size = len(self.ours.memory)
        others = self.others.draw(rows, self.negatives or min(CRD_NEGATIVES, size - 1))
        values = []
        for anchor, partner, side in ((s, t, self.theirs), (t, s, self.ours)):
            bank = side.memory["rows"]
            positive = (anchor * (bank[rows] if self.remembered else partner)).sum(1) / self.temperature
            negative = (anchor @ bank.T).gather(1, others) / self.temperature
            if self.mode == "nce":
                values.append(nce(positive - side.log_scale, negative - side.log_scale, population=size))
            else:
                values.append(negative.mean(1) - positive)
        return values[0] + values[1]

    def _local(self, s: Tensor, t: Tensor) -> Tensor:
        cost = cosine_cost(t, s)
        if self.cut:
            cost = cut_cost(cost, self.cut)
        plan = ipot(cost) if self.solver == "ipot" else sinkhorn(cost)
        return (plan * cost).sum()


class Side(nn.Module):
    """Embeds the features of one side, and remembers what it gave for every sample when it was last seen.

    A linear layer of spectral norm one, and then length one: `(batch, ...)` to `(batch, width)`. The norm is
    estimated by power iteration, one step per update however many forward passes that has: torch's spectral norm
    makes one whenever it is in train mode, so it is in eval mode but for :meth:`advance`.
    """

    def __init__(self, inputs: int, ids: Tensor, width: int, lipschitz: bool):
        super().__init__()
        self.linear: Any = nn.Linear(inputs, width)
        self.lipschitz = lipschitz
        if lipschitz:
            spectral_norm(self.linear)
        self.memory = Memory(ids, width)
        self.register_buffer("log_scale", torch.zeros(()))
        self.log_scale: Tensor
        self.eval()

    def forward(self, features: Tensor) -> Tensor:
        return unit(self.linear(features.flatten(1)))

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @torch.no_grad()
    def calibrate(self, anchors: Tensor, temperature: float) -> None:
        """Set the scale of exp(f) to N times its mean over the memory, for anchors of the other side."""
        scores = anchors @ self.memory["rows"].T / temperature
        self.log_scale.copy_(scores.logsumexp((0, 1)) - math.log(len(anchors)))

    @torch.no_grad()
    def advance(self, rows: Tensor, values: Tensor) -> None:
        """Remember new values, and make a step of the power iteration."""
        self.memory.update(rows, values)
        if self.lipschitz:
            norm = self.linear.parametrizations.weight
            norm.train()()
            norm.eval()

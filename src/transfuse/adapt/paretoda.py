"""ParetoDA: extractor steps that raise none of the objectives, chosen by a held-out part of the target domain."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.adapt.base import Adaptation, extractor, run_domains, source_labels
from transfuse.adapt.discriminator import ClassDomains, discriminator, flat, refined
from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError, nearest
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.solvers import gram, guided_descent, weighted
from transfuse.core.streams import Data, Indexed, Stream
from transfuse.losses import IGNORE, Term, domain_cross_entropy, mutual_information, reverse_gradient

MODES = ("auto", "guidance", "descent", "fixed")


class ParetoDA(Adaptation):
    """Combine source labels, domain alignment and target certainty along a Pareto direction of the extractor.

        L1 = CE(source labels)
        L2 = (mean_s -log(1 - D(R(f_s))) + mean_t -log D(R(f_t))) / 2       as DANN, strength 2/(1+exp(-it/warmup))-1
        L3 = -I(r(x_t)),  Lv = -I(r(x_v)),  I = H(mean_x r(x)) - mean_x H(r(x))
        r(k | x)  proportional to  p(k | x) * P_k(target | f(x))            the refined prediction
        L_cd = 1/K sum_k [ mean_s 1[y = k] CE(D_k(f_s), source) + mean_t r(k | x_t) CE(D_k(f_t), target) ]

    g_j are the gradients of L1, L2, L3 on the extractor, g_v that of Lv on a batch x_v of target data that was held
    out from training; C_ij = g_i . g_j, a_j = g_j . g_v. A linear programme gives weights w on the simplex
    (:func:`transfuse.core.solvers.guided_descent`): it follows g_v while Lv is poor, and otherwise descends on all
    objectives at once. The extractor gets 3 sum_j w_j g_j; classifier, D and the D_k get the gradient of
    L1 + L2 + L_cd. R reverses gradients. f is detached in D_k, D_k in r, and r in L_cd. No pass of x_v moves running
    statistics. D and the D_k are gone from the deployed model.

    What the solver did is counted in buffers: `updates`; `guided` of them followed g_v; `conflicts` raised an
    objective to first order; `dropped` holds how often the programme was infeasible and gave up the guidance, or
    all constraints.

    Args:
        layer: tap behind the extractor: everything the features there depend on.
        mode: `"guidance"` or `"descent"` always; `"auto"` guides while log K + Lv > eps; `"fixed"` sets all weights
            equal (no programme), which is the control for it.
        hidden: width of the two hidden layers of D and of each D_k.
        held_out: share of the target data for x_v, drawn once.
        warmup: updates of the reversal's warm start.
        eps: see `mode`.
        normalise: bring the gradients to equal length before the programme, as their scales decide it.
        extractor_lr: learning rate of the extractor as a multiple of the others'; use 1 for one that is not pretrained.
        release_mode: as the authors' released code: r multiplies logits instead of probabilities and stays
            unnormalised in L_cd; the extractor gets g1 + g2 on top; infeasible is answered by weights of 1 each; and
            `"auto"` compares Lv itself, which is never above eps.

    Raises:
        InputError: an argument is out of range; the source has no labels; the target data has no length or is too
            small to hold something out.
        DivergenceError: a gradient is not finite.
        ShapeError: source labels are out of the model's range, or the domains' inputs differ in shape.

    Source: Lv et al., NeurIPS 2021, arXiv:2112.04137.
    """

    card = Card(
        paper="Lv et al., NeurIPS 2021",
        arxiv="2112.04137",
        sheet=156,
        carries="gradients",
        teacher="data",
        data="unlabelled",
        tasks=("classification",),
    )

    def __init__(
        self,
        layer: str = "penultimate",
        mode: str = "auto",
        hidden: int = 1024,
        held_out: float = 0.1,
        warmup: float = 1000.0,
        eps: float = 1e-3,
        normalise: bool = False,
        extractor_lr: float = 0.1,
        release_mode: bool = False,
    ):
        super().__init__()
        if mode not in MODES:
            raise InputError(f"ParetoDA: unknown mode {mode!r}: {nearest(mode, MODES)}")
        if not 0 < held_out < 1:
            raise InputError(f"ParetoDA: held_out is {held_out}, it must be a share between 0 and 1")
        if hidden < 1 or warmup <= 0 or extractor_lr <= 0:
            raise InputError("ParetoDA: hidden, warmup and extractor_lr must be positive")
        self.layer, self.mode, self.hidden, self.held_out, self.warmup = layer, mode, hidden, held_out, warmup
        self.eps, self.normalise, self.extractor_lr, self.release_mode = eps, normalise, extractor_lr, release_mode
        self.domains: nn.Module | None = None
        self.class_domains: ClassDomains | None = None
        for name, size in (("updates", ()), ("guided", ()), ("conflicts", ()), ("dropped", (2,))):
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64))
        self.updates: Tensor
        self.guided: Tensor
        self.conflicts: Tensor
        self.dropped: Tensor
        self.order: Tensor

    def wants(self) -> dict[str, list[str]]:
        return {"target": [self.layer]}

    def setup(self, run: Run, sample: Batch | None) -> None:
        data = run.data.get("data")
        if not isinstance(data, Indexed):
            raise InputError("ParetoDA holds out a part of the target data, so pass a data set or tensors as data=...")
        if not 0 < round(self.held_out * data.size) < data.size:
            raise InputError(
                f"ParetoDA: a share of {self.held_out} of {data.size} target samples holds out none, or all"
            )
        self.register_buffer("order", torch.randperm(data.size, generator=run.shared_rng("held out")))
        for counter in (self.updates, self.guided, self.conflicts, self.dropped):
            counter.zero_()
        super().setup(run, sample)

    def build(self, source: Outputs, target: Outputs) -> None:
        width, classes = flat(source, self.layer).shape[1], source.logits.shape[1]
        self.domains = discriminator(width, self.hidden)
        self.class_domains = ClassDomains(width, self.hidden, classes)

    def streams(self, run: Run) -> dict[str, Stream | Data]:
        data = run.data["data"]
        assert isinstance(data, Indexed)
        order, count = self.order.cpu(), round(self.held_out * data.size)
        return {
            "target": data.subset(order[count:]).without_labels(),
            "source": run.data["source"],
            "held out": data.subset(order[:count]).without_labels(),
        }

    def stage(self, i: int, run: Run) -> Stage:
        features = extractor(run, self.layer, type(self).__name__)
        below = set(features)
        heads = [p for p in (*run["target"].parameters(), *self.parameters()) if p not in below]
        groups: list[dict[str, Any]] = [{"params": features, "lr_scale": self.extractor_lr}, {"params": heads}]
        phase = Phase("adapt", self.losses, groups, combine=self.direction, shared=features)
        return Stage(self.streams(run), [phase], keep="best")

    def losses(self, batches: Batches, run: Run) -> Losses:
        """All terms; those of weight 0 are for the direction alone."""
        assert self.domains is not None
        source, target = run_domains(run, batches["source"], batches["target"])
        strength = 2 / (1 + math.exp(-run.clock.step / self.warmup)) - 1
        here, there = (self.domains(reverse_gradient(flat(o, self.layer), strength)) for o in (source, target))
        source_domains, target_domains = (self._class_domains(o) for o in (source, target))
        rho = self._refined(target, target_domains)
        return {
            "labels": source_labels(source.logits, batches["source"]),
            "source domain": 0.5 * Term.of(domain_cross_entropy(here, target=False), unit="source/sample"),
            "target domain": 0.5 * Term.of(domain_cross_entropy(there, target=True)),
            "surrogate": 0.0 * Term(-mutual_information(rho)),
            "guide": 0.0 * Term(self._guide(batches, run)),
            "source class domain": _of_source(source_domains, batches["source"]),
            "target class domain": self._of_target(target_domains, rho.detach()),
        }

    def direction(self, rows: dict[str, list[Tensor]], run: Run) -> list[Tensor]:
        """The extractor's gradient."""
        alignment = [(s + t) / 2 for s, t in zip(rows["source domain"], rows["target domain"], strict=True)]
        objectives = [rows["labels"], alignment, rows["surrogate"]]
        products, count = gram([*objectives, rows["guide"]]), len(objectives)
        weights, follow, dropped = self._solve(products, float(run.values["guide"]))
        slopes = products[:count, :count] @ weights
        conflict = bool((slopes < -1e-8 * products.abs().max()).any())
        self._did = follow, conflict, dropped  # applied once the update is done
        return weighted(objectives, weights)

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        follow, conflict, dropped = self._did
        self.updates += 1
        self.guided += follow
        self.conflicts += conflict
        if dropped:
            self.dropped[dropped - 1] += 1

    def _solve(self, products: Tensor, guide: float) -> tuple[Tensor, bool, int]:
        """One weight per objective, whether the guide was followed, and what had to be dropped."""
        assert self.class_domains is not None
        count = len(products) - 1
        scale = torch.ones(count, dtype=products.dtype)
        if self.normalise:
            length = products.diagonal()[:count].sqrt()
            scale = length.mean() / length.masked_fill(length == 0, torch.inf)
        if self.mode == "fixed":
            return scale, False, 0
        poor = guide if self.release_mode else math.log(self.class_domains.classes) + guide
        follow = self.mode == "guidance" or (self.mode == "auto" and poor > self.eps)
        scaled = products[:count, :count] * scale[:, None] * scale
        weights, dropped = guided_descent(scaled, products[:count, count] * scale, follow)
        if self.release_mode:
            weights = torch.ones_like(weights) if dropped else weights
            weights = weights + torch.tensor([1.0, 1.0, 0.0], dtype=weights.dtype) / count
        return count * weights * scale, follow, dropped

    def _guide(self, batches: Batches, run: Run) -> Tensor:
        """-I of refined predictions on held-out target data; running statistics do not see it."""
        still = {name: buffer.clone() for name, buffer in run["target"].named_buffers()}
        outputs = run("target", batches["held out"], params=still)
        return -mutual_information(self._refined(outputs, self._class_domains(outputs)))

    def _class_domains(self, outputs: Outputs) -> Tensor:
        assert self.class_domains is not None
        logits: Tensor = self.class_domains(flat(outputs, self.layer).detach())
        return logits

    def _refined(self, outputs: Outputs, class_domains: Tensor) -> Tensor:
        return refined(outputs.logits, class_domains, multiply_logits=self.release_mode)

    def _of_target(self, class_domains: Tensor, rho: Tensor) -> Term:
        """Every target sample, seen by all the discriminators as much as it may be of their class."""
        rho = rho if self.release_mode else rho.softmax(1)
        return Term.of(-(rho * class_domains.log_softmax(2)[..., 1]).mean(1))


def _of_source(class_domains: Tensor, batch: Batch) -> Term:
    """Every labelled source sample, seen by the discriminator of its own class."""
    known = batch.labels != IGNORE
    own = class_domains[torch.arange(len(known), device=known.device), batch.labels.clamp(min=0)]
    return Term.of(-own.log_softmax(1)[:, 0] / class_domains.shape[1], known, "source/labelled")

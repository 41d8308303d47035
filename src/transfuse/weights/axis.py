"""AXIS: merge the strongest directions of many fine-tuned models, then tune a few singular values of the merge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.labels import labels_term
from transfuse.core.method import Bag
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.weights.base import Merge
from transfuse.weights.checkpoint import InMemory
from transfuse.weights.composed import Composed
from transfuse.weights.engine import depths_of
from transfuse.weights.factors import Factors
from transfuse.weights.task_vectors import TaskVectors, layer

Order = Literal["top", "random", "bottom"]


class AXIS(Composed):
    """Sum the top rank-one terms of all sources' weight differences, then train the merge's largest singular values.

    For every weight matrix of the base (a convolution's as `(out, in * height * width)`), independently:

        D_i = theta_i - theta_0 = sum over terms of s u v^T                     for every source i
        D   = sum over the K terms with the largest s, of all sources together  = U diag(S) V^T
        theta = theta_0 + U diag(Lambda, S_frozen) V^T                          Lambda: the first N of S, trained

    Sources are read one after the other and K terms are kept, so memory does not grow with their number. The terms of
    different sources are not orthogonal; U S V^T is found through QR of the stacked factors. The sum is not rescaled:
    two equal sources give twice the change (the report shows the ratio of spectral norms). What is no matrix (biases,
    norms) gets the mean of the sources' changes; a matrix that no source has changed, such as a head that all share,
    stays as it is. The target is the base; what is deployed is the base with everything folded in. It runs in eval mode
    and keeps the base's buffers.

    The authors train ten epochs with AdamW and lr=0.1: singular values of differences are small numbers.

    Args:
        rank: K as a share of min(rows, columns).
        tuned: N as a share of min(rows, columns). Where it is more than the terms there are, directions orthogonal to
            them are added, with singular values of 0.
        merge: another merge in the place of the sum of terms, to be tuned in the same way; or `"base"`, no merge at
            all: singular values of the base's own weights are tuned.
        order: which singular values are trained: `"top"`, or as ablations `"random"` (drawn with the run's seed) or
            `"bottom"` (of the largest K).
        head: path of a layer that is trained itself, from the base's; by default none.
        head_lr_scale: factor of the learning rate for the head.

    Raises:
        InputError: an argument is out of its range; sources or labelled data are missing; a source was not trained from
            this base, or holds NaN.
        ShapeError: a source's tensor differs in shape from the base's.

    Source: 2025, arXiv:2508.19353.
    """

    card = Card(
        paper="Efficient Multi-Source Knowledge Transfer by Model Merging, 2025",
        arxiv="2508.19353",
        sheet=8,
        carries="weights",
        teacher="weights",
        data="labelled",
        tasks=("classification", "language-model"),
    )

    def __init__(
        self,
        rank: float = 0.1,
        tuned: float = 0.1,
        merge: Merge | Literal["base"] | None = None,
        order: Order = "top",
        head: str | None = None,
        head_lr_scale: float = 0.01,
    ):
        super().__init__()
        if not 0 < rank <= 1 or not 0 < tuned <= 1:
            raise InputError(f"AXIS: rank is {rank} and tuned {tuned}, both must be above 0 and at most 1")
        if merge is not None and merge != "base" and not isinstance(merge, Merge):
            raise InputError(f"AXIS: merge is {merge!r}, expected a merge such as Linear(), or 'base'")
        if order not in ("top", "random", "bottom"):
            raise InputError(f"AXIS: order is {order!r}, known are 'top', 'random' and 'bottom'")
        if not head_lr_scale > 0:
            raise InputError(f"AXIS: head_lr_scale is {head_lr_scale}, it must be positive")
        self.rank, self.tuned, self.merge, self.order = rank, tuned, merge, order
        self.head, self.head_lr_scale = head, head_lr_scale
        self.values = Bag()
        """Lambda of every matrix."""
        self.fixed = Bag()
        """U, S and V of every matrix, which of S are trained, and the changes of what is no matrix."""

    def setup(self, run: Run, sample: Batch | None) -> None:
        if run.shuffled:
            raise InputError("AXIS reads the sources' weights, not their outputs, so there is no shuffled arm")
        if sample is None or sample.labels is None or "data" not in run.data:
            raise InputError("AXIS learns from the labels of one data set: pass data=(inputs, labels)")
        vectors = TaskVectors(run["target"], {role: run[role] for role in run.sources}, self.head)
        self._depths = depths_of(InMemory({block: p.detach() for block, p in vectors.base.items()}, "base"))
        draw, ratios = torch.Generator().manual_seed(run.seed), {}
        for block, base in vectors.base.items():
            if base.dim() < 2 or not any(change.any() for change in _each(vectors, block)):
                self.fixed[_key(block, "change")] = self._change(vectors, block)
                continue
            factors = self._factors(vectors, block)
            size = min(base.flatten(1).shape)
            count = max(1, round(self.tuned * size))
            factors = factors.completed(count)
            self.fixed[_key(block, "trained")] = rows = self._which(factors, count, size, draw)
            for name in ("u", "s", "v"):
                self.fixed[_key(block, name)] = getattr(factors, name)
            self.values[_key(block, "lambda")] = nn.Parameter(factors.s[rows].clone())
            strongest = max(float(torch.linalg.matrix_norm(d.flatten(1), 2)) for d in _each(vectors, block))
            ratios[block] = float(factors.s.max()) / max(strongest, 1e-12)
        self.fixed["ratios"] = torch.tensor(list(ratios.values()))
        self._blocks, self._matrices = vectors.blocks, list(ratios)

    def compose(self, target: nn.Module) -> dict[str, Tensor]:
        own = dict(target.named_parameters())
        found = {}
        for block in self._blocks:
            base = own[block].detach()
            if (key := _key(block, "change")) in self.fixed:
                found[block] = base + self.fixed[key].to(base.dtype)
                continue
            factors = Factors(*(self.fixed[_key(block, name)] for name in ("u", "s", "v")))
            s = factors.s.index_copy(0, self.fixed[_key(block, "trained")], self.values[_key(block, "lambda")])
            change = factors.dense(s - factors.s if self.merge == "base" else s)
            found[block] = base + change.view_as(base).to(base.dtype)
        return found

    def thawed(self, target: nn.Module) -> list[nn.Parameter]:
        return [] if self.head is None else list(layer(target, self.head).parameters())

    def loss(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        return {"labels": labels_term(self.run_composed(run, batch).learning, batch)}

    def stage(self, i: int, run: Run) -> Stage:
        groups: list[dict[str, Any]] = [{"params": list(self.values.parameters()), "weight_decay": 0.0}]
        if self.head is not None:
            groups.append({"params": self.thawed(run["target"]), "lr_scale": self.head_lr_scale})
        return Stage({"data": run.data["data"]}, [Phase("singular values", self.loss, groups)], keep="best", train=())

    def panels(self) -> list[dict[str, Any]]:
        if "ratios" not in self.fixed:
            return []
        spectra = {
            block: [(float(i), float(s)) for i, s in enumerate(self.fixed[_key(block, "s")])]
            for block in self._matrices
        }
        return [
            {
                "kind": "lines",
                "title": "Singular values of the merged changes, before tuning",
                "x": "number",
                "y": "singular value",
                "series": spectra,
            },
            {
                "kind": "matrix",
                "title": "Spectral norm of the merged change over that of the largest source",
                "note": "The sum is not rescaled: directions that sources share add up.",
                "rows": ["ratio"],
                "columns": self._matrices,
                "values": [self.fixed["ratios"].tolist()],
            },
        ]

    def _factors(self, vectors: TaskVectors, block: str) -> Factors:
        """The merged change of one matrix, as a singular value decomposition."""
        base = vectors.base[block].detach()
        if self.merge == "base":
            return Factors.of(base.flatten(1))
        if self.merge is not None:
            return Factors.of(self._change(vectors, block).flatten(1))
        return pool(_each(vectors, block), max(1, round(self.rank * min(base.flatten(1).shape)))).orthogonal()

    def _change(self, vectors: TaskVectors, block: str) -> Tensor:
        """What the merge adds to one tensor; of AXIS itself, the mean of the sources' changes."""
        base = vectors.base[block].detach().float()
        if self.merge == "base":
            return torch.zeros_like(base)
        if not isinstance(self.merge, Merge):
            return vectors.stack(block).mean(0)
        tensors = [base + change for change in _each(vectors, block)]
        return self.merge.at(block, self._depths[block]).merge(block, base, tensors) - base

    def _which(self, factors: Factors, count: int, size: int, draw: torch.Generator) -> Tensor:
        """The numbers of the singular values that are trained, among those that the merge has."""
        real = max(count, min(factors.terms, max(1, round(self.rank * size)) if self.merge is None else size))
        order = {
            "top": torch.arange(count),
            "bottom": torch.arange(real - count, real),
            "random": torch.randperm(real, generator=draw)[:count].sort().values,
        }[self.order]
        return order.to(factors.s.device)


def pool(changes: Iterator[Tensor], count: int) -> Factors:
    """The `count` rank-one terms with the largest singular values of several matrices, read one after the other."""
    kept: Factors | None = None
    for change in changes:
        found = Factors.of(change.flatten(1)).top(count)
        kept = found if kept is None else kept.pooled(found).top(count)
    if kept is None:
        raise InputError("there is no matrix to pool the terms of")
    return kept


def _each(vectors: TaskVectors, block: str) -> Iterator[Tensor]:
    return (vectors.difference(i, block) for i in range(len(vectors.names)))


def _key(block: str, what: str) -> str:
    return f"{block.replace('.', '/')}:{what}"  # a dot would be a submodule's

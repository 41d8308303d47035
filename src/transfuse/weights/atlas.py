"""aTLAS: learn how much of every task vector goes into every parameter tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.method import Bag
from transfuse.core.phases import Batches, Losses
from transfuse.core.run import Run
from transfuse.core.streams import Data, Draw, Indexed, Stream
from transfuse.discover.views import view
from transfuse.losses import IGNORE, Term, cross_entropy, pseudo_labels
from transfuse.weights.scaling import Scaling, ready
from transfuse.weights.task_vectors import TaskVectors

Objective = Literal["labels", "negation", "ufm", "entropy"]
KEPT = 0.95
"""Share of the base's accuracy on `keep` that negation may not fall below."""
TRUSTED = 100
"""The most samples of one class that are trusted at test time."""
FIRST = 256
"""Samples of a batch outside training."""


class ATLAS(Scaling):
    """Compose a model from task vectors: one learned coefficient for each vector and parameter tensor.

        theta^(j) = theta_0^(j) + sum over sources i of L_ij tau_i^(j),    tau_i^(j) = theta_i^(j) - theta_0^(j)

    L (sources, blocks) is 0 at first, so training begins at the base; only L is trained, and dLoss/dL_ij is the inner
    product of dLoss/dtheta^(j) and tau_i^(j). The target is the base, the sources were trained from it, and what is
    deployed is the base with the sum folded in. Buffers stay the base's.

    What L is learned for:
        - `"labels"`: sum over the data sets of the mean cross-entropy. One set, `data=...`, is few-shot or supervised
          learning; several, `data={"digits": ..., "letters": ...}`, is the addition of tasks. The state that is best
          on `validate=...` is kept, be it the base. (Leave the target task's own source out; learn on data that is not
          for testing.)
        - `"negation"`: -CE(forget) + CE(keep), of `data={"forget": ..., "keep": ...}`, half a batch each. After every
          epoch both accuracies are measured on that data, and of the coefficients that keep 95 % of the base's accuracy
          on `keep` those that forget most are deployed; what comes after the first that do not is not considered.
        - `"ufm"`: test time, without labels. Of every class the base's k = min(N / (10 C), 100) most confident
          predictions are trusted, and are half of every batch. A sample of the other half is given the class that the
          model predicts, where its probability is above `confidence`; a random view of it is trained with that.
        - `"entropy"`: test time; the mean entropy of predictions, summed over the data sets.

    The authors train with AdamW, clip=1.0, weight decay 0.1 and a cosine: few-shot lr=0.1 (coefficients are of order
    one), otherwise lr=1e-3, for negation 2 to 10 times that.

    Args:
        objective: one of the four above.
        blockwise: off, every source has one coefficient (isotropic scaling).
        groups: split the entries of every tensor into so many random groups with coefficients of their own (aTLAS x K).
        head: path of a layer that is trained itself, from the base's; by default everything is composed, and a head
            that the sources share stays as it is.
        head_lr_scale: factor of the learning rate for the head.
        budget: use only so many sources in each block (or in all, if not blockwise): those with the largest
            |dLoss/dL_ij| on the first batch. By default all.
        linearised: learn in the tangent space of the base, f(x; theta_0) + J(x) (sum L tau); what is deployed then
            evaluates that.
        l1, l2: weights of the penalties sum |L| and sum L^2.
        confidence: for `"ufm"`.
        mirror: for `"ufm"`, whether views of images may be mirrored.
        seed: of the groups.

    Raises:
        InputError: an argument is out of its range; sources are missing, were not trained from this base or hold NaN;
            data is missing, or named otherwise than the objective needs.
        ShapeError: a source's tensor differs in shape from the base's.

    Source: Zhang, Albert, Rodriguez-Opazo, van den Hengel & Abbasnejad, NeurIPS 2024, arXiv:2407.02880.
    """

    card = Card(
        paper="Zhang et al., NeurIPS 2024",
        arxiv="2407.02880",
        sheet=71,
        carries="weights",
        teacher="weights",
        data="unlabelled",
        tasks=("classification", "language-model"),
    )

    def __init__(
        self,
        objective: Objective = "labels",
        blockwise: bool = True,
        groups: int = 1,
        head: str | None = None,
        head_lr_scale: float = 0.01,
        budget: int | None = None,
        linearised: bool = False,
        l1: float = 0.0,
        l2: float = 0.0,
        confidence: float = 0.99,
        mirror: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if objective not in ("labels", "negation", "ufm", "entropy"):
            raise InputError(f"ATLAS: objective is {objective!r}, known are 'labels', 'negation', 'ufm' and 'entropy'")
        if groups < 1 or (budget is not None and budget < 1):
            raise InputError(f"ATLAS: groups is {groups} and budget {budget}, both must be at least 1")
        if l1 < 0 or l2 < 0 or not head_lr_scale > 0:
            raise InputError(f"ATLAS: l1 is {l1}, l2 {l2}: not below 0; head_lr_scale is {head_lr_scale}: above 0")
        if not 0 < confidence < 1:
            raise InputError(f"ATLAS: confidence is {confidence}, it must be between 0 and 1")
        if head is not None and objective != "labels":
            raise InputError(f"ATLAS: a head can be trained with labels only, the objective is {objective!r}")
        self.objective, self.blockwise, self.groups, self.head = objective, blockwise, groups, head
        self.head_lr_scale, self.budget, self.linearised, self.l1, self.l2 = head_lr_scale, budget, linearised, l1, l2
        self.confidence, self.mirror, self.seed = confidence, mirror, seed
        self.keep = "best or start" if objective == "labels" else "last"
        self.trusted = Bag()
        """Ids and pseudo-labels of the samples that are trusted at test time."""
        self.kept = Bag()
        """Of negation: the best coefficients, their accuracies, the base's, and whether `keep` has been lost."""

    def setup(self, run: Run, sample: Batch | None) -> None:
        if self.objective == "negation" and set(run.data) != {"forget", "keep"}:
            raise InputError(
                f"negation forgets one task and keeps another: pass data={{'forget': ..., 'keep': ...}}, found "
                f"{', '.join(run.data) or 'none'}"
            )
        if self.objective == "ufm" and (run.task != "classification" or not isinstance(run.data.get("data"), Indexed)):
            raise InputError("'ufm' needs one data set of samples to classify, read by number: pass data=inputs")
        super().setup(run, sample)

    def choose(self, vectors: TaskVectors, run: Run, sample: Batch | None) -> Tensor:
        if self.budget is None or self.budget >= len(vectors.names):
            return super().choose(vectors, run, sample)
        if self.objective == "ufm":
            raise InputError("ATLAS: 'ufm' has no loss to choose sources by before it trusts samples: leave out budget")
        first = {name: data.sample(FIRST) for name, data in self._read(run).items()}
        batches = {name: ready(batch, run) for name, batch in first.items() if batch is not None}
        scores = self.slopes(vectors, run, lambda: self._terms(batches, run))
        if not self.blockwise:
            scores = scores.sum(1, keepdim=True).expand_as(scores)
        return scores.abs().topk(self.budget, dim=0).indices.sort(0).values

    def loss(self, batches: Batches, run: Run) -> Losses:
        terms = dict(self._terms(batches, run))
        if self.l1:
            terms["l1"] = Term(self.coefficients.abs().sum(), weight=self.l1)
        if self.l2:
            terms["l2"] = Term(self.coefficients.square().sum(), weight=self.l2)
        return terms

    def streams(self, run: Run) -> Mapping[str, Stream | Data]:
        if self.objective not in ("negation", "ufm"):
            return self._read(run)
        half = max(1, (run.training.batch_size if run.training else FIRST) // 2)
        if self.objective == "negation":
            return {name: Stream(run.data[name], half) for name in ("forget", "keep")}
        data = cast(Indexed, run.data["data"])
        trusted = torch.isin(data.ids, self.trusted["ids"].cpu())
        parts = {"data": data.subset((~trusted).nonzero().flatten())}
        if trusted.any():
            parts["trusted"] = data.subset(trusted.nonzero().flatten())
        return {name: Stream(part.without_labels(), min(half, part.size)) for name, part in parts.items()}

    def begin_stage(self, i: int, run: Run) -> bool:
        if i == 0 and self.objective == "ufm":
            self._trust(run)
        if i == 0 and self.objective == "negation":
            for name in ("forget", "keep"):
                self.kept[f"base/{name}"] = self.kept[name] = torch.tensor(self._accuracy(name, run))
            self.kept["coefficients"], self.kept["lost"] = self.coefficients.detach().clone(), torch.tensor(False)
        return i == 0

    def begin_epoch(self, run: Run) -> None:
        if self.objective == "negation" and run.clock.step > 0:
            self._judge(run)

    def end_stage(self, i: int, run: Run) -> None:
        if self.objective == "negation":
            self._judge(run)
            with torch.no_grad():
                self.coefficients.copy_(self.kept["coefficients"])

    def panels(self) -> list[dict[str, Any]]:
        shown = super().panels()
        if "lost" in self.kept:
            values = [[float(self.kept[f"{at}{name}"]) for name in ("forget", "keep")] for at in ("base/", "")]
            shown.append(
                {
                    "kind": "matrix",
                    "title": "Accuracy on what was to be forgotten and kept",
                    "note": "On the data that coefficients were chosen by.",
                    "rows": ["base", "chosen coefficients"],
                    "columns": ["forget", "keep"],
                    "values": values,
                }
            )
        return shown

    def _read(self, run: Run) -> dict[str, Data]:
        """The data of the objective, without labels where it must not see them."""
        unseen = self.objective in ("ufm", "entropy")
        return {name: data.without_labels() if unseen else data for name, data in run.data.items()}

    def _terms(self, batches: Batches, run: Run) -> Losses:
        """The objective without penalties."""
        kinds = {
            "labels": self.labels_of,
            "entropy": self.entropies_of,
            "negation": self._negation,
            "ufm": self._ufm,
        }
        return kinds[self.objective](batches, run)

    def _negation(self, batches: Batches, run: Run) -> Losses:
        terms = self.labels_of(batches, run)
        return {"forget": -1.0 * terms["forget"], "keep": terms["keep"]}

    def _ufm(self, batches: Batches, run: Run) -> Losses:
        """Cross-entropy on views of samples that are trusted or confident, mean over these."""
        other, sure = batches["data"], batches.get("trusted")
        labels = pseudo_labels(self.run_composed(run, other, grad=False).logits, self.confidence)
        inputs = view(other.inputs, mirror=self.mirror)
        if sure is not None:
            rows = torch.searchsorted(self.trusted["ids"], sure.index)
            labels = torch.cat([labels, self.trusted["labels"][rows]])
            inputs = torch.cat([inputs, view(sure.inputs, mirror=self.mirror)])
        values = cross_entropy(self.run_composed(run, Batch(inputs=inputs)).logits, labels)
        return {"ufm": Term.of(values, labels != IGNORE, "late:selected")}

    def _trust(self, run: Run) -> None:
        """Of every predicted class the most confident samples, by the model as it is before training."""
        found, classes = [], 1
        for batch in self._whole("data", run):
            logits = self.run_composed(run, batch, grad=False).logits
            classes = logits.shape[1]
            found.append((batch.index, *logits.softmax(-1).max(-1)))
        index, sure, guess = (torch.cat(parts) for parts in zip(*found, strict=True))
        most = min(len(index) // (10 * classes), TRUSTED)
        best = [(guess == c).nonzero().flatten() for c in range(classes)]
        rows = torch.cat([members[sure[members].argsort(descending=True, stable=True)[:most]] for members in best])
        rows = rows[index[rows].argsort()]
        self.trusted["ids"], self.trusted["labels"] = index[rows], guess[rows]

    def _judge(self, run: Run) -> None:
        """Remember the coefficients if they forget more than any before, and `keep` has never been lost."""
        found = {name: torch.tensor(self._accuracy(name, run)) for name in ("forget", "keep")}
        self.kept["lost"] = self.kept["lost"] | (found["keep"] < KEPT * self.kept["base/keep"])
        if not self.kept["lost"] and found["forget"] < self.kept["forget"]:
            self.kept["coefficients"] = self.coefficients.detach().clone()
            self.kept["forget"], self.kept["keep"] = found["forget"], found["keep"]

    @torch.no_grad()
    def _accuracy(self, name: str, run: Run) -> float:
        right = count = 0
        for batch in self._whole(name, run):
            known = batch.labels != IGNORE
            right += int((self.run_composed(run, batch, grad=False).logits.argmax(-1) == batch.labels)[known].sum())
            count += int(known.sum())
        return right / max(1, count)

    def _whole(self, name: str, run: Run) -> Iterator[Batch]:
        """All of a data set once, in its own order."""
        for micro in run.data[name].epoch(Draw(FIRST, None, shuffle=False, seed=0), 0):
            yield from (ready(batch, run) for batch in micro)

"""LFTL: a trained model adapts to a pool without labels, of which it may buy a few; the source data is gone."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from transfuse.adapt.oracle import Oracle
from transfuse.adapt.query import query_scores
from transfuse.adapt.rounds import Labelled, Round, Unlabelled
from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import InverseDecay
from transfuse.core.errors import InputError, ShapeError, nearest
from transfuse.core.method import Bag, Method
from transfuse.core.phases import Batches, Groups, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Data, Indexed
from transfuse.core.taps import resolve
from transfuse.losses import Term, anchor_entropy, cross_entropy, mutual_information

QUERIES = ("contrastive", "random")
CHUNK = 256
"""Samples of the pool per forward pass where nothing is trained."""


class LFTL(Method):
    """Buy labels where the model is torn, more so than before; adapt to the pool and to the samples that were bought.

    Every round is a stage. It buys the b samples of the smallest score among those without a label:

        u     = p + contrast (p - p_prev)           p: probabilities now, p_prev: at the last query (round 1: u = p)
        U     = u_(1) - u_(2)                       the margin between the two largest; where small, the model is torn
        w     = n_k / max n,  k = argmax p          n: pseudo-labels counted among the `topk` largest margins
        score = U / max U + balance w               so that classes which the easy samples lack come first

    and then adapts for the caller's epochs, in updates on a batch without and a batch with labels:

        loss  = CE(labelled) + information L_im + persistence L_vpa
        L_im  = mean_x H(p(x)) - H(mean_x p(x))
        L_vpa = mean_x H(softmax_j cos(e(x), M_j))  M_j: memory of the labelled sample j, e: embedding
        M_j  <- (1 - momentum) M_j + momentum e_j   for all j when an epoch begins, for the batch in every update

    An epoch ends with a pass over the labelled batches it saw, mixed up: x = l x_i + (1 - l) x_j with l the larger
    part of a draw from Beta(mixup, mixup), cross-entropy to the labels mixed alike. The learning rate falls as
    (1 + 10 progress)**-0.75 within a round. The network is not reset between rounds.

    `target=` is the model as its source left it, `data=` the pool. Its labels answer the oracle, and nothing else sees
    them; or give `data={"data": pool, "oracle": answers}`, where sample i of the answers has the label of sample i
    and is read when it is bought. The paper trains 10 to 15 epochs a round by `optimizer="sgd"` (Nesterov is switched
    on here), `momentum=0.9, lr=1e-3, weight_decay=1e-3`. Batches should hold more samples than there are classes.

    Args:
        rounds: how often labels are bought.
        ratio: share of the pool that a round buys; the last one buys what is missing to `rounds * ratio`.
        contrast: how far probabilities are extrapolated away from the last query's.
        balance: weight of the classes that easy samples are rich in.
        topk: how many easy samples are counted.
        information: weight of L_im.
        persistence: weight of L_vpa; the paper takes 10 on VisDA, 1 on Office.
        momentum: of the memory.
        mixup: of the Beta distribution; 0 leaves the pass out.
        cap: draw only ceil(2 B / n) - 1 times as many samples without a label as there are with one (n, of B in the
            end) in an epoch.
        backbone: path of the module whose learning rate is a tenth; None for none.
        features: tap of the embeddings.
        query: `"contrastive"`, or `"random"` for the control. (`contrast=0, balance=0` is margin sampling.)
        ledger: file for bought labels, see :class:`~transfuse.adapt.oracle.Oracle`: none is ever bought twice.

    Raises:
        InputError: an argument out of range; a budget larger than the pool, or rounds that would buy nothing; a pool
            that changed between rounds; a label that is no class.
        LayerError: the model has no such `backbone` or `features`.

    Source: Lyu et al., ECCV 2024, arXiv:2407.18899.
    """

    card = Card(
        paper="Lyu et al., ECCV 2024",
        arxiv="2407.18899",
        sheet=96,
        carries="features",
        teacher="weights",
        data="few-labelled",
        tasks=("classification",),
    )
    family = "adapt"
    uses_source = False
    scored_by_stage = True
    select = "mutual_information"

    def __init__(
        self,
        rounds: int = 10,
        ratio: float = 0.001,
        contrast: float = 0.03,
        balance: float = 0.1,
        topk: int = 500,
        information: float = 0.9,
        persistence: float = 1.0,
        momentum: float = 0.9,
        mixup: float = 0.75,
        cap: bool = False,
        backbone: str | None = None,
        features: str = "penultimate",
        query: str = "contrastive",
        ledger: str | None = None,
    ):
        super().__init__()
        if rounds < 1 or topk < 1 or not 0 < ratio <= 1 or not 0 <= momentum <= 1:
            raise InputError(
                f"LFTL: rounds is {rounds} and topk {topk}, both must be 1 at least; ratio is {ratio}, it must lie in "
                f"(0, 1]; momentum is {momentum}, it must lie in [0, 1]"
            )
        if min(contrast, balance, information, persistence, mixup) < 0:
            raise InputError("LFTL: contrast, balance, information, persistence and mixup must not be negative")
        if query not in QUERIES:
            raise InputError(f"LFTL: there is no query {query!r}: {nearest(query, QUERIES)}")
        self.rounds, self.ratio, self.contrast, self.balance, self.topk = rounds, ratio, contrast, balance, topk
        self.information, self.persistence, self.momentum, self.mixup = information, persistence, momentum, mixup
        self.cap, self.backbone, self.features, self.query, self.ledger = cap, backbone, features, query, ledger
        self.state = Bag()
        self._seen: list[tuple[Tensor, Tensor]] = []

    def wants(self) -> dict[str, list[str]]:
        return {"target": [self.features]}

    def setup(self, run: Run, sample: Batch | None) -> None:
        pool, answers = _pool(run), _answers(run)
        self.sizes(pool.size)
        self._groups(run)
        if answers.size != pool.size:
            raise InputError(
                f"the oracle has {answers.size} answers for a pool of {pool.size} samples: give one for each"
            )
        few = pool.sample(2).to(run.device)
        if self.mixup and not (isinstance(few.inputs, Tensor) and few.inputs.is_floating_point()):
            raise InputError("LFTL mixes inputs, so they must be one tensor of real numbers: mixup=0 leaves that out")
        outputs = run("target", few, grad=False)
        embeddings, logits = outputs.features[self.features], outputs.logits
        if embeddings.dim() != 2 or logits.dim() != 2 or logits.shape[1] < 2:
            raise ShapeError(
                f"LFTL needs embeddings (samples, features) and logits of two classes at least, found "
                f"{tuple(embeddings.shape)} at {self.features!r} and {tuple(logits.shape)}: tap another layer"
            )
        if self.information and run.training and run.training.batch_size < logits.shape[1]:
            run.watch.say(
                "small batches",
                f"LFTL spreads every batch evenly over {logits.shape[1]} classes, and one of "
                f"{run.training.batch_size} samples cannot hold them all: choose a larger batch_size",
            )
        self.state["bought"] = self.state["labels"] = torch.empty(0, dtype=torch.long)
        self.state["memory"] = embeddings.new_zeros(0, embeddings.shape[1])
        self.state["ids"] = _ids(pool)

    def sizes(self, pool: int) -> list[int]:
        """How many labels every round buys."""
        each, whole = round(pool * self.ratio), round(pool * self.ratio * self.rounds)
        sizes = [each] * (self.rounds - 1) + [whole - each * (self.rounds - 1)]
        if whole >= pool or min(sizes) < 1:
            raise InputError(
                f"LFTL: {self.rounds} rounds of {self.ratio:.3g} of a pool of {pool} samples would buy "
                f"{', '.join(map(str, sizes))} labels: a round must buy one at least, and all fewer than the pool has"
            )
        return sizes

    # A round -------------------------------------------------------------------------------------------------------

    def begin_stage(self, i: int, run: Run) -> bool:
        if i == self.rounds:
            return False
        pool, state = self._unchanged(run), self.state
        free, sizes = self._free(pool), self.sizes(pool.size)
        probabilities, _ = self._read(pool, free, run)
        if self.query == "random":
            order = torch.randperm(len(free), generator=run.shared_rng("query"))
        else:
            previous = state["previous"][free] if "previous" in state else None
            scores = query_scores(probabilities, previous, self.contrast, self.balance, self.topk)
            order = scores.sort(stable=True).indices.cpu()
        chosen = free[order[: sizes[i]]]
        labels = torch.empty_like(chosen, device=run.device)
        if run.rank == 0:  # one process pays
            oracle = Oracle(_answers(run), sum(sizes), probabilities.shape[1], state["bought"].cpu(), self.ledger)
            labels = oracle.buy(chosen).to(run.device)
        run.sync.broadcast([labels])
        # By samples of the pool, so that rows cannot come to belong to others when some are bought.
        state["previous"] = probabilities.new_zeros(pool.size, probabilities.shape[1])
        state["previous"][free] = probabilities
        state["bought"] = torch.cat([state["bought"], chosen.to(run.device)])
        state["labels"] = torch.cat([state["labels"], labels])
        state["memory"] = F.pad(state["memory"], (0, 0, 0, len(chosen)))
        return True

    def stage(self, i: int, run: Run) -> Stage:
        pool = self._unchanged(run)
        free, bought = self._free(pool), self.state["bought"].cpu()
        limit = len(free)
        if self.cap:
            multiple = math.ceil(2 * sum(self.sizes(pool.size)) / len(bought)) - 1
            limit = min(limit, multiple * len(bought))
        now = Round(pool, free, limit, bought, self.state["labels"].cpu(), again=self.mixup > 0)
        phase = Phase("adapt", self.losses, self._groups(run), schedule=InverseDecay())
        return Stage({"target": Unlabelled(now), "labelled": Labelled(now)}, [phase])

    def begin_epoch(self, run: Run) -> None:
        _, embeddings = self._read(_pool(run), self.state["bought"].cpu(), run)
        memory = torch.lerp(self.state["memory"], embeddings, self.momentum)
        run.sync.broadcast([memory])  # running statistics may differ between processes
        self.state["memory"] = memory

    def losses(self, batches: Batches, run: Run) -> Losses:
        unlabelled, labelled = batches["target"], batches["labelled"]
        if unlabelled.inputs is None:
            return self._mixed(labelled, run)
        terms: Losses = {}
        # Batch normalisation cannot work on one sample.
        free = run("target", unlabelled) if (self.information or self.persistence) and unlabelled.size > 1 else None
        if labelled.size > 1:
            known = run("target", labelled)
            terms["labels"] = Term.of(cross_entropy(known.logits, labelled.labels), unit="labelled/sample")
            self._seen.append((labelled.row, known.features[self.features].detach()))
        if free is not None:
            terms["information"] = self.information * Term(-mutual_information(free.logits))
            terms["persistence"] = self.persistence * Term.of(
                anchor_entropy(free.features[self.features], self._refreshed())
            )
        return terms

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        memory = self.state["memory"]
        self.state["memory"] = memory + run.sync.sum(self._refreshed() - memory)
        self._seen = []

    # Parts ---------------------------------------------------------------------------------------------------------

    def _refreshed(self) -> Tensor:
        """The memory with the labelled embeddings of the update at hand in it."""
        memory = self.state["memory"].clone()
        for rows, embeddings in self._seen:
            memory[rows] = torch.lerp(memory[rows], embeddings, self.momentum)
        return memory

    def _mixed(self, labelled: Batch, run: Run) -> Losses:
        if labelled.size < 2:
            return {}
        x, y = labelled.inputs, labelled.labels
        draw = torch.distributions.Beta(self.mixup, self.mixup).sample((len(x),)).to(x.device)
        part, other = torch.maximum(draw, 1 - draw), torch.randperm(len(x), device=x.device)
        share = part.view(-1, *[1] * (x.dim() - 1))
        logits = run("target", Batch(inputs=share * x + (1 - share) * x[other])).logits
        values = part * cross_entropy(logits, y) + (1 - part) * cross_entropy(logits, y[other])
        return {"mixup": Term.of(values, unit="labelled/sample")}

    def _read(self, pool: Indexed, rows: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Probabilities and embeddings of samples of the pool, in eval mode and without a trace."""
        probabilities, embeddings = [], []
        with run.probe():
            run["target"].eval()
            for part in rows.split(CHUNK):
                outputs = run("target", pool.fetch(part).to(run.device), grad=False)
                probabilities.append(outputs.logits.softmax(1))
                embeddings.append(outputs.features[self.features])
        return torch.cat(probabilities), torch.cat(embeddings)

    def _free(self, pool: Indexed) -> Tensor:
        unsold = torch.ones(pool.size, dtype=torch.bool)
        unsold[self.state["bought"].cpu()] = False
        return unsold.nonzero().flatten()

    def _unchanged(self, run: Run) -> Indexed:
        pool = _pool(run)
        if not torch.equal(self.state["ids"].cpu(), _ids(pool)):
            raise InputError("the pool is not the one that labels were bought for: give the same samples in one order")
        return pool

    def _groups(self, run: Run) -> Groups:
        """Everything by SGD's Nesterov momentum, the backbone at a tenth of the rate."""
        target = run["target"]
        paths = [] if self.backbone is None else resolve(target, self.backbone)
        slow = {p for path in paths for p in target.get_submodule(path).parameters()}
        return [
            {"params": [p for p in target.parameters() if p in slow], "nesterov": True, "lr_scale": 0.1},
            {"params": [p for p in target.parameters() if p not in slow], "nesterov": True},
        ]


def _pool(run: Run) -> Indexed:
    return _single_samples(run.data.get("data"))


def _answers(run: Run) -> Indexed:
    """What has the labels: of its own, or the pool itself."""
    return _single_samples(run.data.get("oracle", run.data.get("data")))


def _single_samples(data: Data | None) -> Indexed:
    if not isinstance(data, Indexed):
        raise InputError("LFTL buys labels of single samples: pass map-style data sets or tensors, data=pool")
    return data


def _ids(pool: Indexed) -> Tensor:
    """The samples by their numbers in the root data set."""
    return torch.arange(pool.size) if pool.root is None else pool.root

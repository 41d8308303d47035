"""ORC: network-group distillation with online role change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.labels import labels_term
from transfuse.core.method import Bag
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Observe, Phase, Stage
from transfuse.core.run import Run
from transfuse.distill.online import Online
from transfuse.losses import IGNORE, Term, cross_entropy, kl_divergence


class ORC(Online):
    """Teach a group of students by a pivot, and by the students that are best at the moment.

        L_KD(s, t) = T**2 * KL(softmax(t / T) || softmax(s / T)), t a constant

        ranking:   the k students with the least cross-entropy on the batch become temporary teachers, TT
        intensive: pivot    L_I = lam * CE(y, pivot(x~)) + (1 - lam) * CE(y_F, pivot(x~)),
                            x~ = lam * x + (1 - lam) * x_F,  lam ~ Beta(mixing, mixing)
        private:   each TT  L_P = (1 - beta) * CE(y, TT(x)) + beta * L_KD(TT, pivot)
        group:     others   L_T = (1 - beta) * CE(y, S(x)) + beta * (sum over TT of L_KD(S, TT) + L_KD(S, pivot))

    in this order in every update, each teacher with the weights that it has then; afterwards every TT is a student
    again. The feedback F is as large as the batch and drawn from what the students got wrong: student k gives a share
    of softmax_k(error rate), rounded by largest remainders, out of its own errors, with replacement where it has too
    few. Where nobody erred, L_I is the cross-entropy on the batch.

    `source` is a list: the pivot, trained before, then the other students; the target is the last student, and may be
    promoted like any other. Ranks count the whole update, feedback is drawn within each micro-batch. To be ranked,
    students run once more, without a graph. Which taught how often in which epoch is kept in :attr:`promotions`.

    T, beta, the mixing and how shares are rounded are ours, not checked against the authors'. A sum of two
    distillation terms pulls twice as hard as one teacher does: mind it when comparing.

    Args:
        temperature: T > 0.
        beta: weight of the teachers, in [0, 1].
        promoted: k, how many temporary teachers; fewer than there are students. Several were worse in the paper.
        rank: promote by the least `"loss"` or by the best `"accuracy"`; ties go to the earlier student.
        momentum: of a moving average of what students are ranked by, in [0, 1); 0 ranks by each batch alone, which is
            noisy below 64 samples.
        feedback: whether the pivot learns from what students got wrong; if not, it stays as it is.
        shares: a student's share of the feedback follows its `"errors"` or its `"loss"`.
        mixing: parameter of the Beta distribution.
        reduction: `"sum"` or `"mean"` over teachers in L_T.

    Raises:
        VocabularyError: the networks count different classes.
        InputError: not fewer promoted than students, networks that share parameters, or inputs that cannot be mixed.

    Source: Choi, Cho, Cheung & Hwang, ICCV 2023, arXiv:2206.01186.
    """

    card = Card(
        paper="Choi, Cho, Cheung & Hwang, ICCV 2023",
        arxiv="2206.01186",
        sheet=70,
        carries="outputs",
        teacher="full",
        data="labelled",
    )

    def __init__(
        self,
        temperature: float = 4.0,
        beta: float = 0.5,
        promoted: int = 1,
        rank: Literal["loss", "accuracy"] = "loss",
        momentum: float = 0.0,
        feedback: bool = True,
        shares: Literal["errors", "loss"] = "errors",
        mixing: float = 1.0,
        reduction: Literal["sum", "mean"] = "sum",
    ):
        super().__init__()
        for name, value, fits, range_ in (
            ("temperature", temperature, temperature > 0, "positive"),
            ("beta", beta, 0 <= beta <= 1, "between 0 (labels only) and 1 (teachers only)"),
            ("promoted", promoted, promoted >= 0, "0 or more"),
            ("rank", rank, rank in ("loss", "accuracy"), "'loss' or 'accuracy'"),
            ("momentum", momentum, 0 <= momentum < 1, "at least 0 and below 1"),
            ("shares", shares, shares in ("errors", "loss"), "'errors' or 'loss'"),
            ("mixing", mixing, mixing > 0, "positive"),
            ("reduction", reduction, reduction in ("sum", "mean"), "'sum' or 'mean'"),
        ):
            if not fits:
                raise InputError(f"ORC: {name} is {value!r}, it must be {range_}")
        self.temperature, self.beta, self.promoted, self.rank = temperature, beta, promoted, rank
        self.momentum, self.feedback, self.shares = momentum, feedback, shares
        self.mixing, self.reduction = mixing, reduction
        self.table = Bag()
        self._seen = Seen()
        self._decision: Decision | None = None

    @property
    def promotions(self) -> Tensor:
        """`(epochs, students)`: how often each student was a temporary teacher in each epoch."""
        return self.table["promotions"]

    def setup(self, run: Run, sample: Batch | None) -> None:
        super().setup(run, sample)
        assert sample is not None
        students = len(self.students(run))
        if self.promoted >= students:
            raise InputError(
                f"ORC: promoted is {self.promoted}, it must be below the number of students, {students} with the "
                "target: pass source=[pivot, student, ...]"
            )
        if self.feedback and not (isinstance(sample.inputs, Tensor) and sample.inputs.is_floating_point()):
            raise InputError("ORC mixes samples, which needs inputs that are one tensor of floats; or feedback=False")
        self.table["promotions"] = torch.zeros(0, students, dtype=torch.long)
        self.table["ranking"] = torch.full((students,), torch.inf)  # nobody was ranked yet

    def stage(self, i: int, run: Run) -> Stage:
        pivot, *students = self.group(run)
        taught = self.groups(run, students)
        phases: list[Phase | Observe] = [Observe("ranking", self.look)]
        if self.feedback:
            phases += [Phase("intensive", self.intensive, run[pivot].parameters())]
        if self.promoted:
            phases += [Phase("private", self.private, taught, optimizer="students")]
        phases += [Phase("group", self.in_group, taught, optimizer="students")]
        return Stage({"data": self.data(run)}, phases, train=[*students, *([pivot] if self.feedback else [])])

    def students(self, run: Run) -> list[str]:
        """Every role but the pivot."""
        return self.group(run)[1:]

    def begin_epoch(self, run: Run) -> None:
        self.table["promotions"] = torch.cat([self.promotions, self.promotions.new_zeros(1, len(self.students(run)))])

    def look(self, batches: Batches, run: Run) -> None:
        """Run the students on a micro-batch, and note what each got wrong."""
        batch = batches["data"]
        labelled = batch.labels != IGNORE
        logits = [self.own(role, batch, run, grad=False).logits for role in self.students(run)]
        wrong = torch.stack([(one.argmax(-1) != batch.labels) & labelled for one in logits])
        loss = torch.stack([cross_entropy(one, batch.labels).sum() for one in logits])
        self._seen.wrong[id(batch)] = wrong
        self._seen.sums.append(torch.stack([loss, wrong.sum(1), labelled.sum().expand_as(loss)]))

    def intensive(self, batches: Batches, run: Run) -> Losses:
        """L_I: the pivot on the batch, mixed with what its students got wrong."""
        batch, pivot = batches["data"], self.group(run)[0]
        chosen = self.draw(self._seen.wrong[id(batch)], self._decided(run).rates[self.shares])
        if not len(chosen):
            return {"labels": labels_term(self.own(pivot, batch, run).logits, batch)}
        lam = float(torch.distributions.Beta(self.mixing, self.mixing).sample())
        mixed = Batch(batch, inputs=torch.lerp(batch.inputs[chosen], batch.inputs, lam))
        logits = self.own(pivot, mixed, run).logits
        values = lam * cross_entropy(logits, batch.labels) + (1 - lam) * cross_entropy(logits, batch.labels[chosen])
        return {"labels": Term.of(values, batch.labels != IGNORE, "labelled")}

    def private(self, batches: Batches, run: Run) -> Losses:
        """L_P: the pivot teaches those who will teach."""
        return self._teach(self._decided(run).promoted, [], batches["data"], run)

    def in_group(self, batches: Batches, run: Run) -> Losses:
        """L_T: every teacher teaches those who were not promoted."""
        promoted = self._decided(run).promoted
        rest = [role for role in self.students(run) if role not in promoted]
        return self._teach(rest, promoted, batches["data"], run)

    def loss(self, role: str, networks: Mapping[str, Outputs], batch: Batch, clock: Clock) -> Losses:
        own = networks[role].logits
        teachers = [outputs.logits for name, outputs in networks.items() if name != role]
        taught = torch.stack([kl_divergence(own, teacher, temperature=self.temperature) for teacher in teachers])
        both = taught.mean(0) if self.reduction == "mean" else taught.sum(0)
        return {"labels": (1 - self.beta) * labels_term(own, batch), "kd": self.beta * Term.of(both)}

    def draw(self, wrong: Tensor, performance: Tensor) -> Tensor:
        """The feedback: rows of the batch that students got wrong, as many as the batch has, or none.

        Args:
            wrong: `(students, batch)`, true where a student erred.
            performance: `(students,)`, the higher the worse; its softmax is each student's share.
        """
        if not wrong.any():
            return torch.empty(0, dtype=torch.long, device=wrong.device)
        shares = performance.masked_fill(~wrong.any(1), -torch.inf).softmax(0)
        drawn = []
        for row, count in zip(wrong, apportion(shares, wrong.shape[1]), strict=True):
            rows = row.nonzero().flatten()
            few = count > len(rows)
            drawn.append(rows[torch.randint(len(rows), (count,)) if few else torch.randperm(len(rows))[:count]])
        return torch.cat(drawn)

    def promote(self, scores: Tensor) -> list[int]:
        """The students that teach in this update, by `(students,)` scores of which the least is the best."""
        return scores.sort(stable=True).indices[: self.promoted].tolist()

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        if phase.name == "group":
            decided = self._decided(run)
            self.table["ranking"] = decided.scores
            self.promotions[-1, [self.students(run).index(role) for role in decided.promoted]] += 1
            self._seen, self._decision = Seen(), None

    def panels(self) -> list[dict[str, Any]]:
        students = self.promotions.shape[1]
        names = [*(f"source.{k}" for k in range(1, students)), "target"]
        shares = self.promotions.double() / self.promotions.sum(1, keepdim=True).clamp(min=1) * self.promoted
        series = {name: list(enumerate(shares[:, k].tolist(), start=1)) for k, name in enumerate(names)}
        title, y = "Who was promoted", "share of updates"
        return [{"kind": "lines", "title": title, "x": "epoch", "y": y, "series": series}] if self.promoted else []

    def _decided(self, run: Run) -> Decision:
        """How the students did in this update over all processes, and who is promoted for it; found out once."""
        if self._decision is None:
            loss, errors, count = run.sync.sum(torch.stack(self._seen.sums).sum(0))
            rates = {"loss": loss / count.clamp(min=1), "errors": errors / count.clamp(min=1)}
            now, before = rates["loss" if self.rank == "loss" else "errors"], self.table["ranking"]
            scores = torch.where(before.isinf(), now, self.momentum * before + (1 - self.momentum) * now)
            students = self.students(run)
            self._decision = Decision(rates, scores, [students[k] for k in self.promote(scores)])
        return self._decision

    def _teach(self, roles: Sequence[str], promoted: Sequence[str], batch: Batch, run: Run) -> Losses:
        """Let the promoted, and the pivot, teach these roles."""
        pivot = self.group(run)[0]
        if id(batch) not in self._seen.pivot:  # it stays as it is between private and group teaching
            self._seen.pivot[id(batch)] = run(pivot, batch, grad=False)
        teachers = {role: run(role, batch, grad=False) for role in promoted} | {pivot: self._seen.pivot[id(batch)]}
        terms: dict[str, Term] = {}
        for role in roles:
            found = self.loss(role, {**teachers, role: self.own(role, batch, run)}, batch, run.clock)
            terms |= {f"{role}/{name}": term for name, term in found.items()}
        return terms


@dataclass
class Seen:
    """What is remembered within one update, by micro-batch: `(students, batch)` errors, sums, the pivot's outputs."""

    wrong: dict[int, Tensor] = field(default_factory=dict)
    sums: list[Tensor] = field(default_factory=list)
    pivot: dict[int, Outputs] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """How students did in an update: `(students,)` each of `"loss"` and `"errors"`; and who teaches in it."""

    rates: dict[str, Tensor]
    scores: Tensor
    promoted: list[str]


def apportion(shares: Tensor, size: int) -> list[int]:
    """Whole numbers in proportion to shares that sum to 1, which sum to `size`: by largest remainders."""
    exact = shares.double() * size
    counts = exact.floor().long()
    left = size - int(counts.sum())
    counts[(exact - counts).sort(descending=True, stable=True).indices[:left]] += 1
    return counts.tolist()

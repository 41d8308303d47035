"""CrKD: novel classes are found while their relation to the known ones is kept (class-relation distillation)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.phases import Batches, Losses
from transfuse.core.run import Run
from transfuse.core.taps import PENULTIMATE
from transfuse.discover.base import Discovery
from transfuse.discover.heads import Prototypes
from transfuse.losses import IGNORE, Term
from transfuse.losses.clustering import balanced_assignment, gated_relation

TEACHER = "source.teacher"
"""A source like any other, so that a control run can shuffle what it says."""


class CrKD(Discovery):
    """Cluster unlabelled samples into novel classes, taught by what a model of the known classes says about them.

    Stage 1 learns the known classes: CE(cos / tau). A frozen copy becomes the teacher. Stage 2, with logits
    [known; novel of head h], views v and samples i:

        target_i^v = one-hot label | [0; SK(novel cosines)]            labelled | unlabelled, of large views
        cluster    = mean over large v, other views v', i of CE(softmax(z_i^v' / tau), target_i^v)
        a = softmax(known teacher / (tau T)),  b = softmax(known / (tau T))
        w = sum over known of softmax([known; novel] / (tau T)),  w <- w / mean(w)
        relation   = mean over large v, heads, unlabelled i of -T^2 w sum_c a_c log b_c

        loss = mean over heads of cluster + alpha * relation

    SK are Sinkhorn-Knopp assignments, which use all novel classes equally. Losses couple the samples of a
    micro-batch. Deployed is the head with the lowest clustering loss over the training.

    Args:
        novel, heads, hidden, width, views, small_views, tau, pretrain: see :class:`Discovery`.
        alpha: weight of the relation; 0 is clustering alone, and runs no teacher.
        temperature: T.
        epsilon: of the assignments.
        detach_gate: let no gradient flow through w; the paper's code lets it.

    Raises:
        InputError: an argument is out of range; the data is not labelled and unlabelled, or the known classes are not
            0, 1, ...; a batch has fewer unlabelled samples than novel classes.

    Source: Gu et al., ICCV 2023.
    """

    card = Card(
        paper="Gu et al. (Cr-KD), ICCV 2023",
        sheet=62,
        carries="outputs",
        teacher="none",
        data="labelled",
    )

    def __init__(
        self,
        novel: int,
        heads: int = 4,
        hidden: int = 2048,
        width: int = 256,
        views: int = 2,
        small_views: int = 0,
        tau: float = 0.1,
        pretrain: float = 0.2,
        alpha: float = 0.1,
        temperature: float = 4.0,
        epsilon: float = 0.05,
        detach_gate: bool = False,
    ):
        super().__init__(novel, heads, hidden, width, views, small_views, tau, pretrain)
        if alpha < 0 or temperature <= 0 or epsilon <= 0:
            raise InputError(
                f"CrKD: alpha is {alpha}, at least 0; temperature {temperature} and epsilon {epsilon} must be positive"
            )
        self.alpha, self.temperature, self.epsilon, self.detach_gate = alpha, temperature, epsilon, detach_gate

    def setup(self, run: Run, sample: Batch | None) -> None:
        super().setup(run, sample)
        self.teacher: nn.Module = run.clone("target").requires_grad_(False)
        self.teacher_head = Prototypes(self.known_head.weight.shape[1], self.known).requires_grad_(False)
        run.add(TEACHER, self.teacher)
        run.tap(TEACHER, [PENULTIMATE])

    def begin_discovery(self, run: Run) -> None:
        self.teacher.load_state_dict(run["target"].state_dict())
        self.teacher_head.load_state_dict(self.known_head.state_dict())

    def loss(self, labelled: Sequence[Tensor], unlabelled: Sequence[Tensor], batches: Batches, run: Run) -> Losses:
        labels, count = batches["labelled"].labels, len(unlabelled[0])
        if count < self.novel:
            raise InputError(f"a batch has {count} unlabelled samples for {self.novel} novel classes: raise batch_size")
        known = F.one_hot(labels.clamp(min=0), self.known + self.novel).to(labelled[0].dtype)
        known = known[labels != IGNORE]
        terms, novel = {}, []
        for number, head in enumerate(self.novel_heads):
            views = [
                (self._logits(a[labels != IGNORE], head), self._logits(b, head))
                for a, b in zip(labelled, unlabelled, strict=True)
            ]
            targets = [torch.cat([known, self._assigned(z)]) for _, z in views[: self.views]]
            predictions = [torch.cat(both) / self.tau for both in views]
            pairs = [(t, p) for v, t in enumerate(targets) for w, p in enumerate(predictions) if v != w]
            value = torch.stack([F.cross_entropy(p, t) for t, p in pairs]).mean()
            terms[f"cluster.{number}"] = (1 / self.heads) * Term(value)
            novel.append(torch.stack([z for _, z in views[: self.views]]))
        if self.alpha:
            logits = torch.stack(novel, 1) / self.tau  # (views, heads, samples, known + novel)
            teacher = self._teacher(len(labelled[0]), run) / self.tau
            relation = gated_relation(
                logits[..., : self.known],
                logits[..., self.known :],
                teacher.unsqueeze(1).expand(-1, self.heads, -1, -1),
                self.temperature,
                self.detach_gate,
            )
            terms["relation"] = self.alpha * Term(relation.mean())
        return terms

    def _logits(self, features: Tensor, head: nn.Module) -> Tensor:
        """Cosines with known and novel prototypes, `(samples, known + novel)`."""
        return torch.cat([self.known_head(features), head(features)], 1)

    def _assigned(self, cosines: Tensor) -> Tensor:
        """Targets of unlabelled samples: nothing known, balanced over the novel classes."""
        novel = balanced_assignment(cosines[:, self.known :].detach(), self.epsilon)
        return torch.cat([novel.new_zeros(len(novel), self.known), novel], 1)

    def _teacher(self, labelled: int, run: Run) -> Tensor:
        """The teacher's known cosines of the unlabelled samples, `(views, samples, known)`."""
        views = [v[labelled:] for v in self._views[: self.views]]
        features = run(TEACHER, Batch(inputs=torch.cat(views)), grad=False).features[PENULTIMATE]
        return torch.stack(self.teacher_head(features).split(len(views[0])))

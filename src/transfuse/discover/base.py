"""The family of class discovery: labelled samples of known classes, and unlabelled ones of classes not named yet.

The caller gives `data={"labelled": ..., "unlabelled": ...}`; labels of the latter, if it has any, are not looked at.
A run has two stages: the known classes are learned, then both together. A method of the family is one function,
`loss(labelled, unlabelled, labels, run)`, of the features of every view.

In tests, labels from the number of known classes on are novel; their accuracy is that of the best matching of
clusters with classes. Named sets (`test={"old": ..., "new": ...}`) give All, Old and New.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.errors import InputError
from transfuse.core.head import head_of, headless
from transfuse.core.method import Method
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Indexed
from transfuse.core.taps import PENULTIMATE
from transfuse.discover.heads import DiscoveredModel, NovelHead, Prototypes
from transfuse.discover.views import view
from transfuse.losses import IGNORE, Term, cross_entropy
from transfuse.measure.discovery import matched


class Discovery(Method):
    """Base of the family. `"target"` is a classifier whose features (its head's input) are used; its head is not.

    Args:
        novel: number of novel classes, at least 2.
        heads: how many novel heads learn side by side; the best one is deployed.
        hidden, width: of their projectors.
        views: large random views of every sample, at least 2; `small_views` are windows of it.
        tau: cosines are divided by it to become logits.
        pretrain: part of the training in which the known classes are learned alone.
    """

    family = "discover"
    uses_source = False
    brings_head = True

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
    ):
        super().__init__()
        name = type(self).__name__
        if novel < 2:
            raise InputError(f"{name}: novel is {novel}: at least two classes are needed to tell apart")
        if views < 2 or heads < 1 or small_views < 0:
            raise InputError(f"{name}: views is {views}, at least 2; heads is {heads}, at least 1; small_views >= 0")
        if tau <= 0 or not 0 < pretrain < 1:
            raise InputError(f"{name}: tau is {tau}, it must be positive; pretrain is {pretrain}, between 0 and 1")
        self.novel, self.heads, self.hidden, self.width = novel, heads, hidden, width
        self.views, self.small_views, self.tau, self.pretrain = views, small_views, tau, pretrain
        self.register_buffer("head_losses", torch.zeros(heads))
        self.head_losses: Tensor

    # What a method of the family says -------------------------------------------------------------------------------

    def loss(self, labelled: Sequence[Tensor], unlabelled: Sequence[Tensor], batches: Batches, run: Run) -> Losses:
        """The terms of one micro-batch of the second stage.

        Args:
            labelled, unlabelled: features `(samples, width)` of every view, the large ones first.
            batches: the samples themselves, `"labelled"` with labels.
        """
        raise NotImplementedError

    def begin_discovery(self, run: Run) -> None:
        """Called once, when the known classes have been learned."""

    # What they all share --------------------------------------------------------------------------------------------

    def wants(self) -> dict[str, list[str]]:
        return {"target": [PENULTIMATE]}

    def setup(self, run: Run, sample: Batch | None) -> None:
        self.known = _known_classes(type(self).__name__, run)
        labelled = run.data["labelled"].sample(8)
        assert labelled is not None
        labelled = labelled.to(run.device)
        self._head = head_of(run["target"], labelled.inputs)
        features = run("target", labelled, grad=False).features[PENULTIMATE].shape[1]
        self.known_head = Prototypes(features, self.known)
        self.novel_heads = nn.ModuleList(
            NovelHead(features, self.hidden, self.width, self.novel) for _ in range(self.heads)
        )
        self.head_losses.zero_()

    def begin_stage(self, i: int, run: Run) -> bool:
        if i == 1:
            self.begin_discovery(run)
        return i < 2

    def stage(self, i: int, run: Run) -> Stage:
        body = [p for name, p in run["target"].named_parameters() if not name.startswith(f"{self._head}.")]
        labelled = run.data["labelled"]
        if i == 0:
            phase = Phase("known", self.supervised, [*body, *self.known_head.parameters()])
            return Stage({"labelled": labelled}, [phase], share=self.pretrain)
        phase = Phase("discover", self.losses, [*body, *self.learned()])
        streams = {"unlabelled": run.data["unlabelled"].without_labels(), "labelled": labelled}
        return Stage(streams, [phase], share=1 - self.pretrain)

    def learned(self) -> list[nn.Parameter]:
        """The heads' parameters."""
        return [*self.known_head.parameters(), *self.novel_heads.parameters()]

    def learns(self, i: int) -> list[nn.Parameter]:  # type: ignore[override]
        return [] if i == 0 else self.learned()

    def supervised(self, batches: Batches, run: Run) -> Losses:
        """Cross-entropy of the known classes on one view."""
        batch = batches["labelled"]
        features = run("target", Batch(inputs=view(batch.inputs))).features[PENULTIMATE]
        value = cross_entropy(self.known_head(features) / self.tau, batch.labels)
        return {"known": Term.of(value, batch.labels != IGNORE, "labelled")}

    def losses(self, batches: Batches, run: Run) -> Losses:
        inputs = torch.cat([batches["labelled"].inputs, batches["unlabelled"].inputs])
        count = batches["labelled"].size
        small = [False] * self.views + [True] * self.small_views
        self._views = [view(inputs, s) for s in small]
        # One pass over all views, so that batch normalisation sees what the deployed model's statistics are of.
        features = run("target", Batch(inputs=torch.cat(self._views))).features[PENULTIMATE].split(len(inputs))
        return self.loss([f[:count] for f in features], [f[count:] for f in features], batches, run)

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        self.known_head.normalise()
        for number, head in enumerate(self.novel_heads):
            assert isinstance(head, NovelHead)
            head.prototypes.normalise()
            if f"cluster.{number}" in values:
                self.head_losses[number] += values[f"cluster.{number}"]

    @property
    def best_head(self) -> int:
        """The head whose clustering loss, summed over the training, is the lowest."""
        return int(self.head_losses.argmin())

    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        if int(labels.max()) >= self.known + self.novel:
            raise InputError(
                f"held-out data has the class {int(labels.max())}: {self.known} known and {self.novel} novel classes "
                f"are 0 to {self.known + self.novel - 1}. Raise novel=, or leave those samples out"
            )
        return matched(logits.argmax(1), labels, self.known)

    def deploy(self, target: nn.Module) -> nn.Module:
        body = headless(target, self._head)
        return DiscoveredModel(body, self.known_head, self.novel_heads[self.best_head], self.tau)


def _known_classes(name: str, run: Run) -> int:
    """How many classes the labelled data has.

    Raises:
        InputError: a stream is missing, or the labels are not 0, 1, ... without a gap.
    """
    if set(run.data) != {"labelled", "unlabelled"}:
        raise InputError(
            f"{name} learns from two data sets, found {', '.join(run.data) or 'none'}: "
            'pass data={"labelled": ..., "unlabelled": ...}'
        )
    labelled = run.data["labelled"]
    if not isinstance(labelled, Indexed):
        raise InputError(f"{name} counts the known classes, so the labelled data must be a data set, not a loader")
    classes = labelled.all_labels().unique()
    classes = classes[classes != IGNORE]
    if not len(classes) or classes.tolist() != list(range(len(classes))):
        raise InputError(f"{name}: the known classes must be 0, 1, ... without a gap, found {classes.tolist()}")
    return len(classes)

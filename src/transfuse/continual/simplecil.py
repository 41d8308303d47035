"""SimpleCIL and ADAM: a frozen pretrained encoder and class means, for ADAM beside a copy adapted to the first task."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse.continual.base import Learner
from transfuse.continual.heads import PrototypeModel, Prototypes, merge
from transfuse.continual.pet import PETS, batch_norms, with_pet
from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError, nearest
from transfuse.core.head import headless
from transfuse.core.method import Bag
from transfuse.core.phases import Batches, Losses, Observe, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Generated
from transfuse.core.taps import PENULTIMATE
from transfuse.losses import Term, cross_entropy
from transfuse.losses.clustering import cosine_logits

RETURNING = ("mean", "reject")


class SimpleCIL(Learner):
    """Class-incremental learning without training: a class is the mean of its features.

        p_c = mean over the class's training samples of phi(x);      score_c(x) = cos(phi(x), p_c)

    phi, the target up to its head, stays bit-identical and runs in eval mode; old rows never change. The deployed
    model answers over all classes; those not seen yet are ruled out. Scores are cosines, not calibrated logits.
    Give the data as it is tested: means of randomly augmented samples are other means.

    Args:
        normalise: bring features to length 1 before they are averaged (not in the paper).
        returning: what happens when a class comes back in a later task: `"mean"` averages over all its samples,
            `"reject"` is an error before the run.

    Raises:
        InputError: a class comes back and shall not; an unknown word.

    Source: Zhou et al., IJCV 2024, arXiv:2303.07338.
    """

    card = Card(
        paper="Zhou et al., IJCV 2024",
        arxiv="2303.07338",
        sheet=174,
        carries="features",
        teacher="tasks",
        data="labelled",
    )

    def __init__(self, normalise: bool = False, returning: str = "mean"):
        super().__init__("task")
        if returning not in RETURNING:
            raise InputError(f"returning is {returning!r}: {nearest(returning, RETURNING)}")
        self.normalise, self.returning = normalise, returning
        self.prototypes = Prototypes()

    def setup(self, run: Run, sample: Batch | None) -> None:
        super().setup(run, sample)
        seen: set[int] = set()
        for task, name in enumerate(run.data):
            classes = set(self.task_heads.classes(task).tolist())
            if self.returning == "reject" and classes & seen:
                raise InputError(f"the classes {sorted(classes & seen)} come back in task {name!r}: returning='mean'")
            seen |= classes

    def head_like(self, run: Run) -> None:
        return None  # prototypes are all the heads there are

    def learns(self, i: int) -> Iterator[nn.Parameter]:
        yield from ()

    def stage(self, i: int, run: Run) -> Stage:
        remember = Observe("prototypes", lambda _batches, run: self.remember(i, run))
        return Stage({"one pass": Generated(1)}, [remember], steps=1, train=())

    def remember(self, task: int, run: Run) -> None:
        """Take the samples of a task into the prototypes."""
        with self.looking(run), torch.no_grad():
            for batch in self.examples(task, run):
                features = self.features(batch, run)
                if self.normalise:
                    features = F.normalize(features, dim=1)
                self.prototypes.add(features, batch.labels)

    def as_rows(self, task: int, batch: Batch) -> Batch:
        return batch

    def features(self, batch: Batch, run: Run) -> Tensor:
        """What prototypes are means of, `(batch, width)`."""
        return run("target", batch, grad=False, until=PENULTIMATE).features[PENULTIMATE]

    def deploy(self, target: nn.Module) -> nn.Module:
        return PrototypeModel([headless(target, self._head)], self.prototypes, self._total)


class ADAM(SimpleCIL):
    """Adapt a copy of the encoder to the first task, put both side by side, then go on as SimpleCIL.

        phi* = phi with a parameter-efficient module, trained on task 0 with CE on sigma * cos(phi*(x), w_c)
        F(x) = [phi(x); phi*(x)];     p_c = mean of F(x) over the class's samples;     score_c(x) = cos(F(x), p_c)

    sigma starts at 1 and is learned. The rows w_c and sigma are thrown away after task 0, phi* is frozen, and every
    task's prototypes, the first one's too, are means of F. (The paper's later versions call it APER.) The caller's
    training is that of task 0; the paper's: SGD with momentum 0.9, lr 0.01, weight decay 5e-4, batches of 48, cosine
    to 0, 20 epochs.

    Args:
        pet: how phi* differs: `"full"` (all weights), `"adapter"` (bottleneck parallel to a layer), `"ssf"` (scale
            and shift of every operation), `"vpt-shallow"`, `"vpt-deep"` (prompt tokens in the first, or in every
            block), `"bn"` (batch-norm statistics of task 0, nothing is trained).
        layers: taps of the layers to adapt; by default see :func:`transfuse.continual.pet.with_pet`.
        width: of an adapter's bottleneck.
        prompts: prompt tokens per block.
        balance: bring each branch to length 1 before they are put side by side (not in the paper): else the branch
            with the larger features decides.
        normalise, returning: as in :class:`SimpleCIL`.

    Raises:
        InputError: an unknown word, or the target has no layers that the module fits.

    Source: Zhou et al., IJCV 2024, arXiv:2303.07338.
    """

    card = Card(
        paper="Zhou et al., IJCV 2024",
        arxiv="2303.07338",
        sheet=174,
        carries="features",
        teacher="tasks",
        data="labelled",
    )

    def __init__(
        self,
        pet: str = "full",
        layers: Sequence[str] | None = None,
        width: int = 64,
        prompts: int = 5,
        balance: bool = False,
        normalise: bool = False,
        returning: str = "mean",
    ):
        super().__init__(normalise, returning)
        if pet not in PETS:
            raise InputError(f"ADAM: pet is {pet!r}: {nearest(pet, PETS)}")
        if width < 1 or prompts < 1:
            raise InputError(f"ADAM: width is {width} and prompts is {prompts}, both must be at least 1")
        self.pet, self.layers, self.width, self.prompts, self.balance = pet, layers, width, prompts, balance
        self.adapted: nn.Module = nn.Identity()
        self.cosine_head = Bag()
        """`"rows"` (classes of task 0, width) and `"scale"`, while task 0 is learned."""

    def setup(self, run: Run, sample: Batch | None) -> None:
        super().setup(run, sample)
        assert sample is not None
        body = headless(run["target"], self._head)
        self.adapted = with_pet(
            body,
            self.pet,
            sample.inputs,
            layers=self.layers,
            width=self.width,
            prompts=self.prompts,
            seed=run.seed,
        )
        if self.pet == "bn" and not batch_norms(self.adapted):
            raise InputError("pet='bn' estimates the statistics of batch-norm layers, and this target has none")
        run.add("adapted", self.adapted)

    def begin_task(self, task: int, run: Run) -> None:
        if task == 0 and self.pet == "bn":
            self.estimate_norms(run)
        elif task == 0:
            like = cast(nn.Linear, run["target"].get_submodule(self._head)).weight
            rows = torch.rand(len(self.task_heads.classes(0)), like.shape[1], generator=run.shared_rng("rows"))
            self.cosine_head["rows"] = nn.Parameter((2 * rows - 1).to(like) / like.shape[1] ** 0.5)
            self.cosine_head["scale"] = nn.Parameter(like.new_ones(()))

    def learns(self, i: int) -> Iterator[nn.Parameter]:
        if i == 0:
            yield from (p for p in (*self.adapted.parameters(), *self.cosine_head.parameters()) if p.requires_grad)

    def stage(self, i: int, run: Run) -> Stage:
        if i > 0 or self.pet == "bn":
            return super().stage(i, run)
        return Stage({"data": self.data(0, run)}, [Phase("adapt", self._adapting, self.learns(0))], train=("adapted",))

    def _adapting(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        logits = cosine_logits(run("adapted", batch).logits, *(self.cosine_head[n] for n in ("rows", "scale")))
        rows = self.task_heads.rows(batch.labels, 0)
        return {"labels": Term.of(cross_entropy(logits, rows), rows >= 0, "labelled")}

    def end_task(self, task: int, run: Run) -> None:
        if "rows" in self.cosine_head:
            for name in ("rows", "scale"):
                del self.cosine_head[name]
            self.remember(task, run)

    @torch.no_grad()
    def estimate_norms(self, run: Run) -> None:
        """Replace the statistics of the copy's batch-norm layers by those of task 0: means over its batches."""
        found = {name: buffer.clone() for name, buffer in self.adapted.named_buffers()}
        norms = batch_norms(self.adapted)
        momenta = [norm.momentum for norm in norms.values()]
        for name, norm in norms.items():
            for statistic in ("running_mean", "running_var", "num_batches_tracked"):
                found[f"{name}.{statistic}"].zero_()
            norm.momentum = None  # so that every batch weighs the same
        with self.looking(run):
            for norm in norms.values():
                norm.train()
            for batch in self.examples(0, run, count=sys.maxsize):
                run("adapted", batch, grad=False, params=found)
        for norm, momentum in zip(norms.values(), momenta, strict=True):
            norm.momentum = momentum
        for name, buffer in self.adapted.named_buffers():
            buffer.copy_(found[name])

    def features(self, batch: Batch, run: Run) -> Tensor:
        return merge([super().features(batch, run), run("adapted", batch, grad=False).logits], self.balance)

    def deploy(self, target: nn.Module) -> nn.Module:
        encoders = [headless(target, self._head), copy.deepcopy(self.adapted)]
        return PrototypeModel(encoders, self.prototypes, self._total, self.balance)

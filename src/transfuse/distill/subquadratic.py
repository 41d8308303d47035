"""Subquadratic KD: from a transformer to a copy of it whose attention is replaced, mixer, block and whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch, padding_mask
from transfuse.core.card import Card
from transfuse.core.clock import Clock, Schedule
from transfuse.core.errors import InputError, ShapeError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Data, Indexed
from transfuse.core.teacher import same_classes
from transfuse.distill.base import Distillation
from transfuse.losses import IGNORE, Divergence, Term, match


@dataclass(frozen=True)
class Ramp(Schedule):
    """Up from 0 over the share `rise` of a stage, 1 in between, down to 0 over the share `fall`."""

    rise: float
    fall: float = 0.0

    def __call__(self, clock: Clock) -> float:
        up = min(1.0, (clock.step + 1) / (self.rise * clock.steps))
        return up * min(1.0, (1 - clock.fraction) / self.fall) if self.fall else up


SCHEDULES = {"A": Ramp(0.1, 0.1), "B": Ramp(0.2), "C": Ramp(0.1, 0.9)}


class Subquadratic(Distillation):
    """Teach a student whose attention was replaced by a mixer of linear cost, in up to three stages.

    With x_l the TEACHER's input of block l, without a graph:

        A  loss = sum_l mean (Mixer_S,l(norm_l(x_l)) - Attention_T,l)**2                     trains norms and mixers
        B  loss = sum_l mean over tokens of || Block_S,l(x_l) - Block_T,l(x_l) ||_2          trains whole blocks
        C  loss = CE(labels, student) + KL(teacher || student)                               trains everything

    In A and B every block is fed the teacher's input, so no gradient crosses from one block to another, and the last
    block is compared before the final norm. The student is a copy of the teacher, see
    :func:`transfuse.models.subquadratic_student`. Stages share the caller's steps, and read parts of the data that are
    disjoint and in order. Each has AdamW with betas (0.9, 0.95) and weight decay 0.1, a learning rate and a schedule
    of its own, so the caller's are not used: A rises over 10 %, stays, falls over 10 %; B rises over 20 % and stays; C
    rises over 10 % and falls linearly. The paper clips gradients: pass `clip=1.0`.

    Args:
        stages: of `"A"`, `"B"`, `"C"`, in the order they are done.
        target: what A compares: `"output"`, the mixers' outputs, or `"matrix"`, their matrices, each row divided by the
            sum of its sizes, since attention's rows sum to 1 and a mixer's do not.
        kl_reduction: of C; `"token"` is a mean over positions, as the CE's; `"sequence"` sums over the positions of a
            sequence, as the code does that the stages come from: the KL then weighs as many times more as there are
            positions.
        shares: of steps and of data, for A, B and C; those of the stages that are done are scaled to sum to 1.
        lr: learning rates of A, B and C.
        blocks, mixer, norm: where the blocks are in both models, and in a block its attention and the norm before it.
            Hugging Face's decoders: `"model.layers"`, `"self_attn"`, `"input_layernorm"`.

    Raises:
        InputError: an argument is out of its range; a model has no such layers; target and source differ in depth;
            the data cannot be cut into parts.
        ShapeError: target and source differ in width.
        VocabularyError: teacher and student count different classes.

    Source: Haller, Golde & Akbik, 2025, arXiv:2504.14366; stages from Bick, Li, Xing, Kolter & Gu, 2024,
    arXiv:2408.10189.
    """

    card = Card(
        paper="Haller, Golde & Akbik, 2025",
        arxiv="2504.14366",
        sheet=73,
        carries="features",
        teacher="features",
        data="unlabelled",
        tasks=("language-model",),
    )

    def __init__(
        self,
        stages: str = "ABC",
        target: Literal["output", "matrix"] = "output",
        kl_reduction: Literal["token", "sequence"] = "token",
        shares: Sequence[float] = (0.026, 0.053, 0.921),
        lr: Sequence[float] = (2e-4, 2e-3, 3e-4),
        blocks: str = "blocks",
        mixer: str = "attn",
        norm: str = "norm1",
    ):
        super().__init__()
        if stages not in ("ABC", "AB", "AC", "BC", "A", "B", "C"):
            raise InputError(f"Subquadratic: stages is {stages!r}, it must be letters of 'ABC' in their order")
        if target not in ("output", "matrix"):
            raise InputError(f"Subquadratic: target is {target!r}, it must be 'output' or 'matrix'")
        if kl_reduction not in ("token", "sequence"):
            raise InputError(f"Subquadratic: kl_reduction is {kl_reduction!r}, it must be 'token' or 'sequence'")
        for name, values in (("shares", shares), ("lr", lr)):
            if len(values) != 3 or min(values) <= 0:
                raise InputError(f"Subquadratic: {name} is {values}, it must be three positive numbers, of A, B and C")
        self.stages, self.target, self.kl_reduction = stages, target, kl_reduction
        self.shares, self.lr = tuple(shares), tuple(lr)
        self.blocks, self.mixer, self.norm = blocks, mixer, norm

    def setup(self, run: Run, sample: Batch | None) -> None:
        depth = {role: len(self._blocks(run[role], role)) for role in ("target", "source")}
        if depth["target"] != depth["source"]:
            raise InputError(f"the target has {depth['target']} blocks, the source {depth['source']}: make them equal")
        for i in range(depth["target"] if set(self.stages) & {"A", "B"} else 0):
            block = f"{self.blocks}.{i}"
            for role in depth:
                run.tap(role, [f"{block}:input", f"{block}.{self.mixer}:input", f"{block}.{self.mixer}", block])
        if "A" in self.stages and self.target == "matrix":
            for role in depth:
                if not all(
                    hasattr(block.get_submodule(self.mixer), "matrix") for block in self._blocks(run[role], role)
                ):
                    raise InputError(
                        f"target='matrix' needs `matrix(x, mask)` of every {self.mixer!r}, the {role}'s have none: use "
                        "target='output'"
                    )
        super().setup(run, sample)

    def build(self, student: Outputs, teacher: Outputs) -> None:
        same_classes(student.scores, teacher.scores)
        for name in student.features:
            ours, theirs = student.features[name].shape, teacher.features[name].shape
            if ours != theirs:
                raise ShapeError(f"{name!r} is {tuple(ours)} in the target and {tuple(theirs)} in the source")

    def begin_stage(self, i: int, run: Run) -> bool:
        return i < len(self.stages)

    def stage(self, i: int, run: Run) -> Stage:
        letter, blocks = self.stages[i], self._blocks(run["target"], "target")
        losses: dict[str, Callable[[Batches, Run], Losses]] = {"A": self.mixers, "B": self.hidden, "C": self.losses}
        trained: dict[str, list[nn.Module]] = {
            "A": [block.get_submodule(name) for block in blocks for name in (self.norm, self.mixer)],
            "B": blocks,
            "C": [run["target"]],
        }
        phase = Phase(
            {"A": "mixers", "B": "hidden", "C": "student"}[letter],
            losses[letter],
            [p for module in trained[letter] for p in module.parameters()],
            partial(torch.optim.AdamW, lr=self.lr["ABC".index(letter)], betas=(0.9, 0.95), weight_decay=0.1),
            schedule=SCHEDULES[letter],
        )
        start, stop = self._share(i)
        return Stage({"data": cut(run.data["data"], start, stop)}, [phase], share=stop - start)

    def mixers(self, batches: Batches, run: Run) -> Losses:
        """Stage A."""
        batch = batches["data"]
        student, teacher = self._forced(batch, run)
        found = []
        for i in range(len(self._blocks(run["target"], "target"))):
            name = f"{self.blocks}.{i}.{self.mixer}"
            if self.target == "output":
                found.append((student[name] - teacher[name]).square().mean(-1))
            else:
                mask = _visible(batch, student[name].shape[1], student[name].device)
                mixer, attention = (run[role].get_submodule(name) for role in ("target", "source"))
                ours = _rows_of_size_one(mixer, student[name + ":input"], mask)
                with torch.no_grad():
                    theirs = _rows_of_size_one(attention, teacher[name + ":input"], mask)
                found.append((ours - theirs).square().mean((1, 3)))
        return {"mixers": Term.of(torch.stack(found).sum(0), batch.mask)}

    def hidden(self, batches: Batches, run: Run) -> Losses:
        """Stage B."""
        batch = batches["data"]
        student, teacher = self._forced(batch, run)
        names = [f"{self.blocks}.{i}" for i in range(len(self._blocks(run["target"], "target")))]
        distances = [torch.linalg.vector_norm(student[name] - teacher[name], dim=-1) for name in names]
        return {"hidden": Term.of(torch.stack(distances).sum(0), batch.mask)}

    def losses(self, batches: Batches, run: Run) -> Losses:
        """Stage C."""
        return super().losses(batches, run)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        labels, mask = batch.labels, batch.mask
        values, entropy = match(student.learning, teacher.scores, Divergence("forward"), labels=labels, rows=mask)
        divergence = Term.of(values, mask)
        if self.kl_reduction == "sequence":
            divergence = Term.of((values if mask is None else torch.where(mask, values, 0)).sum(-1))
        terms = {"teacher": divergence}
        if labels is not None and entropy is not None:
            terms["labels"] = Term.of(entropy, labels != IGNORE, "labelled")
        return terms

    def _forced(self, batch: Batch, run: Run) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """What both models' blocks make of the teacher's inputs."""
        depth = len(self._blocks(run["target"], "target"))
        last = f"{self.blocks}.{depth - 1}"
        teacher = run("source", batch.for_source(), grad=False, until=last).features
        inputs = {f"{self.blocks}.{i}:input": teacher[f"{self.blocks}.{i}:input"].detach() for i in range(depth)}
        return run("target", batch, swap=inputs, until=last).features, teacher

    def _blocks(self, model: nn.Module, role: str) -> list[nn.Module]:
        try:
            blocks = list(model.get_submodule(self.blocks).children())
            for block in blocks:
                block.get_submodule(self.mixer), block.get_submodule(self.norm)
        except AttributeError as error:
            raise InputError(
                f"the {role} has no blocks {self.blocks!r} with {self.mixer!r} and {self.norm!r} ({error}): name its "
                "own with blocks=, mixer= and norm=; Hugging Face decoders have 'model.layers', 'self_attn' and "
                "'input_layernorm'"
            ) from None
        return blocks

    def _share(self, i: int) -> tuple[float, float]:
        """Where stage i begins and ends, as parts of the whole."""
        sizes = [self.shares["ABC".index(letter)] for letter in self.stages]
        return sum(sizes[:i]) / sum(sizes), sum(sizes[: i + 1]) / sum(sizes)


def cut(data: Data, start: float, stop: float) -> Data:
    """The samples between two parts of the whole, in their order.

    Raises:
        InputError: they cannot be read by number, or there are none.
    """
    if (start, stop) == (0.0, 1.0):
        return data
    if not isinstance(data, Indexed):
        raise InputError(
            "Subquadratic reads parts of the data one after another, which needs samples that can be read by number: "
            "pass a data set, not a loader, or do one stage alone"
        )
    rows = torch.arange(round(start * data.size), round(stop * data.size))
    if not len(rows):
        raise InputError(f"a stage's share of {data.size} samples is none: give more data, or other shares=")
    part = data.subset(rows)
    part.relabelled = None if data.relabelled is None else data.relabelled[rows]
    return part


def _rows_of_size_one(mixer: Any, x: Tensor, mask: Tensor) -> Tensor:
    matrix: Tensor = mixer.matrix(x, mask)
    return matrix / matrix.abs().sum(-1, keepdim=True).clamp(min=1e-6)


def _visible(batch: Batch, tokens: int, device: torch.device) -> Tensor:
    """Which token may look at which, `(batch or 1, 1, tokens, tokens)`."""
    seen = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device).tril()
    real = padding_mask(batch)
    itself = torch.eye(tokens, dtype=torch.bool, device=device)
    return seen if real is None else (seen & real[:, None, None, :]) | itself

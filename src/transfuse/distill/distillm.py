"""DistiLLM: a bounded divergence, and texts of the student as often as validation says they are needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transfuse.core import rng
from transfuse.core.batch import Batch, align_tokens
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.method import Bag
from transfuse.core.outputs import Outputs, modes_kept
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Indexed
from transfuse.core.teacher import same_classes
from transfuse.distill.base import Distillation
from transfuse.distill.on_policy import answered, prompts, room
from transfuse.losses import IGNORE, Divergence, Term, label_entropy, match


class DistiLLM(Distillation):
    """Skew KL divergence, on the data and, once validation gets worse, on texts that the student wrote before.

        loss = KL(teacher || skew * teacher + (1 - skew) * student)      reverse: with the sides exchanged

    With probability phi an update is on texts of the student. In the beginning these are written anew, with probability
    1 - t / T later; otherwise they come from a buffer of the newest `capacity` texts, which costs no writing. After
    every `every` updates the cross-entropy of held-out samples is taken; where it has not fallen but risen by `margin`
    over the last time that this happened, phi grows by `step`. So texts of the student are used no earlier than the
    data alone begins to fail it. The first samples drawn from the data are held out, and not trained on.

    Args:
        skew: share of its own side in the mixture, in [0, 1).
        reverse: KL(student || skew * student + (1 - skew) * teacher) instead.
        start: phi at the beginning, in [0, 1].
        step: by which phi grows, up to 1.
        margin: by which the cross-entropy must have risen.
        every: updates between validations.
        held_out: samples that validate.
        capacity: texts in the buffer.
        temperature, prompt, length, end: of the writing, as for :class:`~transfuse.distill.gkd.GKD`.

    Raises:
        InputError: an argument is out of its range, the data cannot be read by number or has no more than `held_out`
            samples, or prompts leave nothing to write.
        VocabularyError: teacher and student count different classes.

    Source: Ko, Kim, Chen & Yun, ICML 2024, arXiv:2402.03898.
    """

    card = Card(
        paper="Ko, Kim, Chen & Yun, ICML 2024",
        arxiv="2402.03898",
        carries="outputs",
        teacher="full",
        data="unlabelled",
        tasks=("language-model",),
    )

    def __init__(
        self,
        skew: float = 0.1,
        reverse: bool = False,
        start: float = 0.0,
        step: float = 0.1,
        margin: float = 0.1,
        every: int = 100,
        held_out: int = 64,
        capacity: int = 1000,
        temperature: float = 1.0,
        prompt: int = 8,
        length: int | None = None,
        end: int | None = None,
    ):
        super().__init__()
        if not 0 <= skew < 1 or not 0 <= start <= 1 or not 0 <= step <= 1:
            raise InputError(f"DistiLLM: skew {skew} must be in [0, 1), start {start} and step {step} in [0, 1]")
        if every < 1 or held_out < 1 or capacity < 1 or prompt < 1 or (length is not None and length < 1):
            raise InputError("DistiLLM: every, held_out, capacity, prompt and length must be at least 1")
        if temperature <= 0:
            raise InputError(f"DistiLLM: temperature is {temperature}, it must be positive")
        self.skew, self.reverse, self.start, self.step, self.margin = skew, reverse, start, step, margin
        self.every, self.held_out, self.capacity = every, held_out, capacity
        self.temperature, self.prompt, self.length, self.end = temperature, prompt, length, end
        self.phi: Tensor
        self.worst: Tensor
        self.register_buffer("phi", torch.tensor(float(start)))
        self.register_buffer("worst", torch.tensor(float("nan")))
        self.buffer, self.phis = Bag(), Bag()
        self._fresh: list[dict[str, Tensor]] = []

    def setup(self, run: Run, sample: Batch | None) -> None:
        data = run.data.get("data")
        if sample is None or not isinstance(data, Indexed):
            raise InputError("DistiLLM holds samples out: pass a data set, not a loader or an iterator")
        if data.size <= self.held_out:
            raise InputError(f"the data has {data.size} samples and {self.held_out} are held out: set held_out= lower")
        room(sample, prompts(sample, self.prompt)[1], self.length)
        super().setup(run, sample)

    def build(self, student: Outputs, teacher: Outputs) -> None:
        same_classes(student.scores, teacher.scores)

    def begin_stage(self, i: int, run: Run) -> bool:
        if i == 0:
            self.worst.fill_(self.validate(run))
        return i == 0

    def stage(self, i: int, run: Run) -> Stage:
        stage = super().stage(i, run)
        return Stage({"data": self._split(run)[1]}, stage.phases)

    def _split(self, run: Run) -> tuple[Indexed, Indexed]:
        """What validates, and what is trained on: the same in every process and after a resume."""
        data = run.data["data"]
        assert isinstance(data, Indexed)
        order = torch.randperm(data.size, generator=torch.Generator().manual_seed(rng.derive(run.seed, "held out")))
        return data.subset(order[: self.held_out].sort().values), data.subset(order[self.held_out :].sort().values)

    @torch.no_grad()
    def validate(self, run: Run) -> float:
        """Mean cross-entropy of the student on what is held out."""
        held, total, count = self._split(run)[0], 0.0, 0.0
        with modes_kept(run["target"]):
            run["target"].eval()
            for rows in torch.arange(held.size).split(64):
                batch = align_tokens(held.fetch(rows)).to(run.device)
                total += float(label_entropy(run("target", batch, grad=False).learning, batch.labels).sum())
                count += float(batch.mask.sum())
        return total / max(count, 1.0)

    def losses(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        # Coins for all micro-batches and processes, so that an update is of one kind.
        own, anew = torch.rand(2, generator=run.shared_rng("DistiLLM")).tolist()
        if own < float(self.phi):
            left = 1 - run.clock.step / run.clock.steps
            batch = self.own_texts(batch, run, anew < left or "input_ids" not in self.buffer)
        return self.loss(*self._shared(run("target", batch), self._teacher(batch, run), batch, run), batch, run.clock)

    def own_texts(self, batch: Batch, run: Run, anew: bool) -> Batch:
        """Texts of the student, as many as the batch has: drawn from the buffer, into which new ones are put before."""
        pool = {name: self.buffer[name] for name in self.buffer._buffers}
        if anew:
            asked, mask = prompts(batch, self.prompt)
            options = {"new_tokens": room(batch, mask, self.length), "temperature": self.temperature, "end": self.end}
            texts = run.generate("target", asked, None if bool(mask.all()) else mask, **options)
            self._fresh.append(_columns(answered(texts, mask, self.end), texts))
            pool = _joined([pool, self._fresh[-1]])
        rows = torch.randint(len(pool["labels"]), (batch.size,))
        labels, ids, real = (pool[name][rows].to(run.device) for name in ("labels", "input_ids", "attention_mask"))
        return Batch(inputs={"input_ids": ids, "attention_mask": real}, labels=labels, mask=labels != IGNORE)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        divergence = Divergence("skew_reverse" if self.reverse else "skew", self.skew)
        values, _ = match(student.learning, teacher.scores, divergence, rows=batch.mask)
        return {"distillm": Term.of(values, batch.mask, "late:token")}

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        fresh, self._fresh = self._fresh, []
        everyone = [text for texts in run.sync.gather_objects(fresh) for text in texts]
        if everyone:
            pool = {name: self.buffer[name] for name in self.buffer._buffers}
            for name, value in _joined([pool, *everyone]).items():
                self.buffer[name] = value[-self.capacity :]
        if (run.clock.step + 1) % self.every == 0:
            found = self.validate(run)
            if found >= float(self.worst) + self.margin:
                self.phi.add_(self.step).clamp_(max=1.0)
                self.worst.fill_(found)
            self.phis[str(run.clock.step + 1)] = torch.tensor([found, float(self.phi)])

    def panels(self) -> list[dict[str, Any]]:
        found = sorted((int(step), *value.tolist()) for step, value in self.phis.named_buffers())
        if not found:
            return []
        series = {
            "held-out cross-entropy": [(float(step), loss) for step, loss, _ in found],
            "phi": [(float(step), phi) for step, _, phi in found],
        }
        title = "The student's own texts"
        note = "phi is the share of updates on them; it grows where validation got worse."
        return [{"kind": "lines", "title": title, "note": note, "x": "update", "series": series}]


def _columns(batch: Batch, texts: Tensor) -> dict[str, Tensor]:
    real = torch.ones_like(texts) if isinstance(batch.inputs, Tensor) else batch.inputs["attention_mask"]
    return {"input_ids": texts.cpu(), "attention_mask": real.cpu(), "labels": batch.labels.cpu()}


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of several lengths in one table, padded on the right."""
    parts = [part for part in parts if part]
    longest = max(part["labels"].shape[1] for part in parts)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}

    def padded(name: str, value: Tensor) -> Tensor:
        return torch.nn.functional.pad(value.cpu(), (0, longest - value.shape[1]), value=fill[name])

    return {name: torch.cat([padded(name, part[name]) for part in parts]) for name in fill}

"""SeqKD: sequence-level distillation, training on what the teacher writes."""

from __future__ import annotations

import torch
from torch import Tensor

from transfuse.core.batch import Batch, align_tokens
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.labels import labels_term
from transfuse.core.method import Bag
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Indexed, as_data
from transfuse.distill.base import Distillation
from transfuse.distill.on_policy import answered, prompts, room
from transfuse.losses import IGNORE


class SeqKD(Distillation):
    """Let the teacher answer every prompt once, and train the student on its answers as if they were the truth.

        loss = CE(teacher's tokens, student), a mean over answers, the end token included

    The teacher writes before the training begins, by greedy decoding or by sampling, and never runs again. Only text
    passes from one to the other; both must read the same token ids.

    Args:
        temperature: of the sampling; 0 takes the most likely token, the mode that the paper approximates by beams.
        prompt: tokens of plain text that serve as a prompt; where prompts are marked (labels -100) they are taken.
        length: tokens that are written at most; None writes as many as the texts of the data are long.
        end: id of the token that ends an answer.
        writes: prompts that the teacher answers at once.

    Raises:
        InputError: an argument is out of its range, the data cannot be read by number, or prompts leave nothing to
            write.

    Source: Kim & Rush, EMNLP 2016, arXiv:1606.07947.
    """

    card = Card(
        paper="Kim & Rush, EMNLP 2016",
        arxiv="1606.07947",
        carries="outputs",
        teacher="text",
        also=("full",),
        data="unlabelled",
        tasks=("language-model",),
    )

    def __init__(
        self,
        temperature: float = 0.0,
        prompt: int = 8,
        length: int | None = None,
        end: int | None = None,
        writes: int = 64,
    ):
        super().__init__()
        if temperature < 0 or prompt < 1 or (length is not None and length < 1) or writes < 1:
            raise InputError("SeqKD: temperature must not be negative, prompt, length and writes at least 1")
        self.temperature, self.prompt, self.length, self.end, self.writes = temperature, prompt, length, end, writes
        self.texts = Bag()

    def setup(self, run: Run, sample: Batch | None) -> None:
        if sample is None or not isinstance(run.data.get("data"), Indexed):
            raise InputError("SeqKD answers every sample once: pass a data set, not a loader or an iterator")
        room(sample, prompts(sample, self.prompt)[1], self.length)

    def begin_stage(self, i: int, run: Run) -> bool:
        if i == 0:
            self._write(run)
        return i == 0

    def _write(self, run: Run) -> None:
        """The teacher's answers to all prompts, the same in every process."""
        data = run.data["data"]
        assert isinstance(data, Indexed)
        parts = []
        for rows in torch.arange(data.size).split(self.writes):
            batch = align_tokens(data.fetch(rows)).to(run.device)
            asked, mask = prompts(batch, self.prompt)
            options = {"new_tokens": room(batch, mask, self.length), "temperature": self.temperature, "end": self.end}
            texts = run.generate("source", asked, None if bool(mask.all()) else mask, **options)
            parts.append((answered(texts, mask, self.end), texts))
        longest = max(texts.shape[1] for _, texts in parts)
        columns: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for batch, texts in parts:
            empty = longest - texts.shape[1]
            there = torch.ones_like(texts) if isinstance(batch.inputs, Tensor) else batch.inputs["attention_mask"]
            # Labels as they are in data, before they are lined up.
            own = torch.nn.functional.pad(batch.labels[:, :-1], (1, 0), value=IGNORE)
            for name, value in (("input_ids", texts), ("labels", own), ("attention_mask", there)):
                fill = IGNORE if name == "labels" else 0
                columns[name].append(torch.nn.functional.pad(value, (0, empty), value=fill).cpu())
        for name, values in columns.items():
            self.texts[name] = torch.cat(values)

    def stage(self, i: int, run: Run) -> Stage:
        inputs = {"input_ids": self.texts["input_ids"].cpu()}
        if not bool(self.texts["attention_mask"].all()):
            inputs["attention_mask"] = self.texts["attention_mask"].cpu()
        written = as_data({"inputs": inputs, "labels": self.texts["labels"].cpu()})
        return Stage({"data": written}, [Phase("student", self.losses, run["target"].parameters())])

    def losses(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        return self.loss(run("target", batch), Outputs(None), batch, run.clock)

    def loss(self, student: Outputs, teacher: Outputs, batch: Batch, clock: Clock) -> Losses:
        return {"written": labels_term(student.learning, batch)}

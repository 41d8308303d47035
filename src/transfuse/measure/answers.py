"""Right, and as its teacher says? Answers that a student writes, beside the truth and beside its teacher's.

The measurement of Ramesh, Sengupta & Chakraborty, "On the Generalization vs Fidelity Paradox in Knowledge
Distillation"; their whole study is :func:`transfuse.distill.fidelity_study.fidelity_study`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from transfuse.core.card import Card
from transfuse.core.decoding import generate
from transfuse.core.errors import InputError, MissingExtraError
from transfuse.measure.base import Measure, Measurement, single_model


@dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
        prompt: what the model reads.
        rationale: what it should write, the answer at the end; learned from in training.
        answer: the answer alone.
        kind: a key of the study's extractors.
    """

    prompt: str
    rationale: str
    answer: str
    kind: str = "number"


@dataclass(frozen=True)
class Coder:
    """How text becomes tokens and back: `encode(text) -> ids` without special tokens, `decode(ids)`, the end token."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    end: int


def number(text: str) -> str | None:
    """The last number, without leading zeros; None where there is none."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return f"{float(found[-1]):.10g}" if found else None


def choice(text: str) -> str | None:
    """The last option letter, A to H, that stands alone."""
    found = re.findall(r"(?<![A-Za-z])([A-H])(?![A-Za-z])", text)
    return found[-1] if found else None


def free_text(text: str) -> str | None:
    """The words in lower case without punctuation."""
    return " ".join(re.findall(r"\w+", text.lower())) or None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {"number": number, "choice": choice, "text": free_text}


class AnswerFidelity(Measure):
    """Measure whether a student answers questions right, and whether it answers and reasons as its teacher does.

    agreement = share of items on which both give the same answer, whatever is right
    fidelity = BLEU of the student's rationales against the teacher's, on the same prompts

    A student may be right without having learned its teacher's reasons, so neither says what the other says;
    |accuracy - teacher's accuracy| <= 1 - agreement. Both decode greedily: drawn texts would differ by chance.

    `measure(source=teacher, target=student, data=items)`, with a list of :class:`Item`.

    Numbers: `agreement`, `when_right` and `when_wrong` (agreement where the teacher is; NaN where it never is),
    `fidelity` (0 to 100), `accuracy`, `teacher_accuracy`, `empty` (share of rationales without a word), `unanswered`
    (share without an answer, which counts as wrong).

    Args:
        coder: how text becomes tokens and back.
        length: tokens that are written at most.

    Raises:
        InputError: length below 1; (in `measure`) no items, or an item of a kind that has no extractor.
        MissingExtraError: sacrebleu is not installed.

    Source: Ramesh, Sengupta & Chakraborty, Findings of ACL 2025.
    """

    card = Card(
        paper="Ramesh, Sengupta & Chakraborty, Findings of ACL 2025",
        sheet=84,
        carries="outputs",
        teacher="text",
        data="labelled",
        tasks=("language-model",),
    )

    def __init__(self, coder: Coder, length: int = 32):
        if length < 1:
            raise InputError(f"AnswerFidelity: length is {length}, it must be at least 1")
        self.coder, self.length = coder, length

    def look(self, source: Any, target: Any, data: Any) -> Measurement:
        teacher, student = single_model(source, "source"), single_model(target, "target")
        if not isinstance(data, Sequence) or not data or not all(isinstance(item, Item) for item in data):
            raise InputError("AnswerFidelity looks at questions: pass data=[Item(prompt, rationale, answer), ...]")
        if unknown := {item.kind for item in data} - set(EXTRACTORS):
            raise InputError(f"no extractor for answers of kind {unknown.pop()!r}: known are {', '.join(EXTRACTORS)}")
        ours, theirs = (write(model, data, self.coder, self.length) for model in (student, teacher))
        found = compare(ours, theirs, data)
        answers = [EXTRACTORS[item.kind](text) for text, item in zip(ours, data, strict=True)]
        order = ("agreement", "when_right", "when_wrong", "fidelity", "accuracy", "teacher_accuracy")
        return Measurement(
            measure=repr(self),
            numbers={
                **{name: found[name] for name in order},
                "empty": _mean([not text.strip() for text in ours]),
                "unanswered": _mean([answer is None for answer in answers]),
            },
            notes=("a student can be right without its teacher's reasons, and faithful to a teacher that is wrong",),
        )


def compare(
    ours: Sequence[str],
    theirs: Sequence[str],
    items: Sequence[Item],
    extractors: Mapping[str, Callable[[str], str | None]] = EXTRACTORS,
) -> dict[str, float]:
    """Accuracy, agreement and fidelity of what a student wrote, given what its teacher wrote to the same prompts.

    Two models that give no answer agree; an empty rationale counts, and has no words in common with any.

    Raises:
        InputError: the numbers of texts and items differ.
        MissingExtraError: sacrebleu is not installed.
    """
    if not len(ours) == len(theirs) == len(items) > 0:
        raise InputError(f"found {len(ours)} and {len(theirs)} texts for {len(items)} items: give one each per item")
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise MissingExtraError("sacrebleu", "llm", "fidelity") from error
    said, taught, truth = (
        [extractors[item.kind](text) for text, item in zip(texts, items, strict=True)]
        for texts in (ours, theirs, [item.answer for item in items])
    )
    right = [t is not None and t == answer for t, answer in zip(taught, truth, strict=True)]
    same = [a == b for a, b in zip(said, taught, strict=True)]
    return {
        "accuracy": _mean([a is not None and a == answer for a, answer in zip(said, truth, strict=True)]),
        "agreement": _mean(same),
        "when_right": _mean([s for s, r in zip(same, right, strict=True) if r]),
        "when_wrong": _mean([s for s, r in zip(same, right, strict=True) if not r]),
        "fidelity": float(BLEU().corpus_score(list(ours), [list(theirs)]).score),
        "teacher_accuracy": _mean(right),
    }


def write(model: nn.Module, items: Sequence[Item], coder: Coder, length: int) -> list[str]:
    """What a model answers to every prompt, by greedy decoding, 64 at a time."""
    device, found = next(model.parameters()).device, []
    for start in range(0, len(items), 64):
        prompts = [coder.encode(item.prompt) for item in items[start : start + 64]]
        longest = max(map(len, prompts))
        ids = torch.tensor([[coder.end] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        texts = generate(model, ids, mask=mask, new_tokens=length, end=coder.end)[:, longest:].tolist()
        found += [coder.decode(t[: t.index(coder.end)] if coder.end in t else t) for t in texts]
    return found


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else float("nan")

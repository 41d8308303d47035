"""Right, and for the teacher's reasons? Students of every size and method, their accuracy beside their fidelity.

The protocol of Ramesh, Sengupta & Chakraborty, Findings of ACL 2025, "On the Generalization vs Fidelity Paradox in
Knowledge Distillation": a grid of teachers, students, methods, temperatures and noise on the teacher's logits; each
student answers held-out questions by greedy decoding, and is compared with the truth and with its teacher's answers.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core import rng
from transfuse.core.errors import InputError, MissingExtraError
from transfuse.core.files import file_name, make_folder, write_atomically
from transfuse.core.method import Method
from transfuse.core.outputs import call, find_logits, full_precision
from transfuse.core.streams import as_data
from transfuse.core.trainer import Trainer
from transfuse.core.training import Training
from transfuse.distill.gkd import GKD
from transfuse.distill.kd import KD
from transfuse.distill.labels import Labels
from transfuse.distill.seqkd import SeqKD
from transfuse.losses import IGNORE
from transfuse.measure.answers import EXTRACTORS, Coder, Item, compare, write

SFT = "SFT"
"""The arm without a teacher, over which gains are taken; trained once per student and seed."""


class NoisyLogits(nn.Module):
    """A teacher whose logits are z + N(0, sigma**2), drawn anew in every pass; sigma 0 leaves them as they are.

    Raises:
        InputError: sigma is negative.
    """

    def __init__(self, model: nn.Module, sigma: float):
        super().__init__()
        if sigma < 0:
            raise InputError(f"sigma is {sigma}, it must not be negative")
        self.model, self.sigma = model, sigma

    def forward(self, **inputs: Any) -> Tensor:
        logits = full_precision(find_logits(call(self.model, inputs)))
        return logits + self.sigma * torch.randn_like(logits) if self.sigma else logits


def default_arms(coder: Coder, length: int) -> dict[str, Callable[[float], Method]]:
    """SFT, SeqKD, forward KL, reverse KL and GKD, with no weight on the labels.

    Only forward KL has a temperature: the others are the same at every one, and are trained at the first alone.

    Args:
        length: tokens that are written at most.
    """
    return {
        SFT: lambda tau: Labels(),
        # prompt=1: marked prompts as they are, however short.
        "SeqKD": lambda tau: SeqKD(prompt=1, length=length, end=coder.end),
        "FKL": lambda tau: KD(temperature=tau, alpha=1.0),
        "RevKD": lambda tau: GKD(share=0.0, beta=1.0),
        "GKD": lambda tau: GKD(prompt=1, length=length, end=coder.end),
    }


@dataclass(frozen=True)
class Outcome:
    """One student.

    Attributes:
        teacher, student, arm, tau, sigma, seed: which; without a teacher (SFT) it is compared with the first.
        size: parameters of the student.
        accuracy: share of right answers; no answer is a wrong one.
        agreement: share of items on which student and teacher give the same answer, right or wrong; `when_right` and
            `when_wrong` where the teacher is; NaN where it never is.
        fidelity: corpus BLEU of the student's rationales against the teacher's, 0 to 100.
        teacher_accuracy: on the same items.
    """

    teacher: str
    student: str
    arm: str
    tau: float
    sigma: float
    seed: int
    size: int
    accuracy: float
    agreement: float
    when_right: float
    when_wrong: float
    fidelity: float
    teacher_accuracy: float


@dataclass(frozen=True)
class FidelityStudy:
    """The outcomes of a grid."""

    outcomes: Sequence[Outcome]

    def gain(self, outcome: Outcome) -> float:
        """Its accuracy over that of the same student and seed without a teacher.

        Raises:
            InputError: that was not trained.
        """
        for o in self.outcomes:
            if (o.arm, o.student, o.seed) == (SFT, outcome.student, outcome.seed):
                return outcome.accuracy - o.accuracy
        raise InputError(f"a gain needs the arm {SFT!r} of student {outcome.student!r} and seed {outcome.seed}")

    def correlation(self, one: str, other: str) -> tuple[float, float]:
        """Spearman's correlation over all taught students, and its p-value.

        Args:
            one, other: attributes of :class:`Outcome`, or `"gain"`: `("size", "gain")`, `("fidelity", "accuracy")`.

        Raises:
            InputError: one side is constant, as the size is with a single student.
        """
        taught = [o for o in self.outcomes if o.arm != SFT]
        columns = [[self.gain(o) if n == "gain" else getattr(o, n) for o in taught] for n in (one, other)]
        for name, values in zip((one, other), columns, strict=True):
            if len(set(values)) < 2:
                raise InputError(f"a correlation with {name!r} is not defined: it is the same in every outcome")
        found = _scipy().spearmanr(*columns)
        return float(found.statistic), float(found.pvalue)

    def t_test(self, arm: str) -> tuple[float, float]:
        """Paired t-test of an arm's accuracies against those without a teacher: statistic and p-value."""
        taught = self._of(arm)
        found = _scipy().ttest_rel([o.accuracy for o in taught], [o.accuracy - self.gain(o) for o in taught])
        return float(found.statistic), float(found.pvalue)

    def anova(self) -> tuple[float, float]:
        """One-way analysis of variance of accuracy over the arms with a teacher: F and p-value."""
        arms = dict.fromkeys(o.arm for o in self.outcomes if o.arm != SFT)
        found = _scipy().f_oneway(*([o.accuracy for o in self._of(arm)] for arm in arms))
        return float(found.statistic), float(found.pvalue)

    def __str__(self) -> str:
        """A table with a row per outcome."""
        names = list(asdict(self.outcomes[0])) if self.outcomes else []
        rows = [names, *([_shown(value) for value in asdict(o).values()] for o in self.outcomes)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def _of(self, arm: str) -> list[Outcome]:
        if not (found := [o for o in self.outcomes if o.arm == arm]):
            raise InputError(f"no outcome of {arm!r}: the study did not hold it")
        return found


def fidelity_study(
    teachers: Mapping[str, nn.Module],
    students: Mapping[str, Callable[[], nn.Module]],
    train: Sequence[Item],
    test: Sequence[Item],
    coder: Coder,
    folder: str | Path,
    *,
    arms: Mapping[str, Callable[[float], Method]] | None = None,
    taus: Sequence[float] = (1.0,),
    sigmas: Sequence[float] = (0.0,),
    seeds: Sequence[int] = (0,),
    length: int = 32,
    extractors: Mapping[str, Callable[[str], str | None]] = EXTRACTORS,
    **training: Any,
) -> FidelityStudy:
    """Train and score every cell of the grid. What is in the folder already is read and not trained again.

    Args:
        teachers, students: by name; a student is built anew for each cell, from the same weights for each seed.
        train, test: questions; only rationales are learned, prompts are not scored.
        folder: one file per cell, and one per teacher with what it wrote. Use a new one when anything else changes.
        arms: by name, a method for a temperature; :func:`default_arms` by default. The arm `"SFT"` is trained once per
            student and seed, the others with every teacher and sigma, and with every temperature on which their
            arguments depend.
        sigmas: standard deviations of noise on the teacher's logits; what the teacher writes has none, so arms that
            learn from text alone are trained with the first.
        length: tokens that are written at most.
        training: what :class:`~transfuse.core.training.Training` takes.

    Raises:
        InputError: a part of the grid is empty, an item's kind has no extractor, and what the methods raise.
        MissingExtraError: sacrebleu is not installed.
    """
    arms = default_arms(coder, length) if arms is None else arms
    for name, part in {"teachers": teachers, "students": students, "train": train, "test": test, "arms": arms}.items():
        if not part:
            raise InputError(f"a study of fidelity needs {name}, found none")
    if unknown := {item.kind for item in test} - set(extractors):
        raise InputError(f"no extractor for answers of kind {unknown.pop()!r}: known are {', '.join(extractors)}")
    folder = Path(folder)
    make_folder(folder)
    first = next(iter(teachers))
    written = {
        name: _once(folder / f"teacher-{file_name(name)}.json", partial(write, model, test, coder, length))
        for name, model in teachers.items()
    }
    data, outcomes, done = tokens_of(train, coder), [], set()
    for student, arm, teacher, tau, sigma, seed in itertools.product(students, arms, teachers, taus, sigmas, seeds):
        method = arms[arm](tau)
        where: tuple[str, float, float] = (teacher, tau, sigma)
        if repr(method) == repr(arms[arm](2 * tau)):
            where = (where[0], taus[0], where[2])
        if method.card.teacher in ("text", "none") or not method.uses_source:
            where = (where[0], where[1], sigmas[0])
        if not method.uses_source:
            where = (first, *where[1:])
        if (key := (student, arm, *where, seed)) in done:
            continue
        done.add(key)

        def cell(
            student: str = student, arm: str = arm, method: Method = method, where: Any = where, seed: int = seed
        ) -> dict[str, Any]:
            name, tau, sigma = where
            with rng.scope(rng.derive(seed, "student", student)):
                model = students[student]()
            source = teachers[name] if sigma == 0 else NoisyLogits(teachers[name], sigma)
            roles = {"target": model, "source": copy.deepcopy(source)} if method.uses_source else {"target": model}
            options = Training(**training, seed=seed)
            trained = Trainer(method, roles, {"data": as_data(data)}, options, task="language-model").fit()
            scores = compare(write(trained, test, coder, length), written[name], test, extractors)
            size = sum(p.numel() for p in model.parameters())
            return asdict(Outcome(name, student, arm, tau, sigma, seed, size, **scores))

        label = "_".join(map(str, key))
        outcomes.append(Outcome(**_once(folder / f"cell-{file_name(label)}.json", cell)))
    return FidelityStudy(outcomes)


def tokens_of(items: Sequence[Item], coder: Coder) -> dict[str, Any]:
    """Questions with their rationales and the end token, padded on the right; labels are -100 but on rationales."""
    rows = [(coder.encode(item.prompt), [*coder.encode(item.rationale), coder.end]) for item in items]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), longest), coder.end)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(rows):
        stop = len(prompt) + len(answer)
        ids[i, :stop] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : stop] = torch.tensor(answer)
        mask[i, :stop] = 1
    return {"inputs": {"input_ids": ids, "attention_mask": mask}, "labels": labels}


def _once(path: Path, make: Callable[[], Any]) -> Any:
    """What the file holds, made and written where it is missing."""
    if not path.exists():
        write_atomically(path, json.dumps(make()))
    return json.loads(path.read_text(encoding="utf-8"))


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _scipy() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtraError("scipy", "data", "the statistics of a study") from error
    return stats

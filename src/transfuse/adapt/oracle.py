"""Labels that cost money: an oracle sells them one by one, counts them, and writes down what was paid for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from transfuse.core.errors import InputError, StoreError
from transfuse.core.streams import Indexed
from transfuse.losses import IGNORE


class Oracle:
    """The only way to the labels of a pool: nothing but what is bought is ever read.

    Args:
        answers: data whose sample i has the label of sample i of the pool.
        budget: how many labels may be bought in all.
        classes: labels are 0 to `classes - 1`.
        sold: samples that were bought before, in this run.
        ledger: file to which every purchase is added at once, and in which it is looked up before the oracle is asked:
            a run that is killed while it buys pays nothing twice. None keeps no file.

    Raises:
        InputError: the budget is larger than the pool.
        StoreError: the ledger cannot be read, or is that of another pool.
    """

    def __init__(self, answers: Indexed, budget: int, classes: int, sold: Tensor, ledger: str | Path | None = None):
        if budget > answers.size:
            raise InputError(f"a budget of {budget} labels is larger than the pool, which has {answers.size} samples")
        self.answers, self.budget, self.classes = answers, budget, classes
        self.sold = set(sold.tolist())
        self.asked = 0
        """How often the data was asked; less than what was bought where a ledger knew the answer."""
        self._ledger = None if ledger is None else Path(ledger)
        self._known = {} if self._ledger is None else _open(self._ledger, answers.size)

    def buy(self, samples: Tensor) -> Tensor:
        """The labels of these samples of the pool, in their order.

        Raises:
            InputError: a sample was bought before, or is none of the pool; the budget is spent; an answer is no class.
        """
        wanted = samples.tolist()
        if again := sorted({s for s in wanted if s in self.sold or wanted.count(s) > 1}):
            raise InputError(f"samples are bought once, asked again for {again}")
        if outside := [s for s in wanted if not 0 <= s < self.answers.size]:
            raise InputError(f"the pool has the samples 0 to {self.answers.size - 1}, asked for {outside}")
        if len(self.sold) + len(wanted) > self.budget:
            raise InputError(
                f"{len(self.sold)} labels of a budget of {self.budget} are bought, {len(wanted)} more are too many"
            )
        labels = [self._label(sample) for sample in wanted]
        self.sold |= set(wanted)
        return torch.tensor(labels, dtype=torch.long)

    def _label(self, sample: int) -> int:
        if sample not in self._known:
            answer = self.answers.fetch(torch.tensor([sample])).labels
            self.asked += 1
            label = IGNORE if answer is None else int(answer)
            if not 0 <= label < self.classes:
                found = "missing" if label == IGNORE else label
                raise InputError(
                    f"the oracle's label of sample {sample} is {found}: expected a class of the target, 0 to "
                    f"{self.classes - 1}"
                )
            self._known[sample] = label
            if self._ledger is not None:
                _append(self._ledger, {"sample": sample, "label": label})
        return self._known[sample]


def _open(path: Path, size: int) -> dict[int, int]:
    """What a ledger holds; a new one begins with the size of its pool."""
    if not path.exists():
        _append(path, {"pool": size})
        return {}
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):  # the writer was killed within a line: it was not paid for
        os.truncate(path, whole)
    try:
        first, *entries = (json.loads(line) for line in content[:whole].splitlines())
        known = {int(entry["sample"]): int(entry["label"]) for entry in entries}
        pool = first["pool"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is no ledger of bought labels ({error}): name another file") from None
    if pool != size:
        raise StoreError(f"{path} is the ledger of a pool of {pool} samples, this one has {size}: name another file")
    return known


def _append(path: Path, entry: dict[str, int]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StoreError(f"the ledger {path} cannot be written to: {error}") from error

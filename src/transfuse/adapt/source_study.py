"""What about a source helps? The same target taught from many variants of it: renamed classes, foreign features, noise.

The study protocol of KTF (Yao et al., 2025, arXiv:2502.13573), for any method that takes labelled data as its source.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from transfuse.adapt.ktf import KTF
from transfuse.core import rng
from transfuse.core.errors import InputError
from transfuse.core.method import Method
from transfuse.core.outputs import call, find_logits
from transfuse.core.streams import Indexed, as_data
from transfuse.core.sync import Sync
from transfuse.core.trainer import Trainer
from transfuse.core.training import Training
from transfuse.measure import spearman

CHUNK = 1024


@dataclass(frozen=True)
class Outcome:
    """One training.

    Attributes:
        source, method, seed: of what.
        accuracy: on the test data; `gain` over the target-only baseline with the same seed and initial weights.
        terms: raw value of every term at the last update. For :class:`KTF` the lower `"source"`, the more discriminable
            the source's classes are, and the lower `"alignment"`, the more transferable the source is.
    """

    source: str
    method: str
    seed: int
    accuracy: float
    gain: float
    terms: Mapping[str, float]


@dataclass(frozen=True)
class SourceStudy:
    """The outcomes of every source, method and seed, and those of the target-only baseline."""

    outcomes: Sequence[Outcome]
    baseline: Sequence[Outcome]

    def accuracy(self, source: str, method: str) -> float:
        """Mean over the seeds."""
        return self._mean([o.accuracy for o in self._of(method, source)])

    def gain(self, source: str, method: str) -> float:
        """Mean over the seeds of what the source adds to the target-only baseline."""
        return self._mean([o.gain for o in self._of(method, source)])

    def correlation(self, method: str, term: str) -> float:
        """Spearman's correlation, over sources, of accuracy with the negative of a term, each a mean over seeds.

        Raises:
            InputError: the method has no such term, or there are fewer than three sources.
        """
        sources = list(dict.fromkeys(o.source for o in self._of(method)))
        if len(sources) < 3:
            raise InputError(f"a rank correlation over sources needs three at least, found {len(sources)}")
        if unknown := {term} - set(self._of(method)[0].terms):
            raise InputError(f"{method} has no term {unknown.pop()!r}: it has {', '.join(self._of(method)[0].terms)}")
        accuracies = [self.accuracy(source, method) for source in sources]
        terms = [-self._mean([o.terms[term] for o in self._of(method, source)]) for source in sources]
        return spearman(torch.tensor(accuracies), torch.tensor(terms))

    def __str__(self) -> str:
        """A table: one row per source and method, with accuracy and gain as means over the seeds."""
        pairs = list(dict.fromkeys((o.source, o.method) for o in self.outcomes))
        rows = [(s, m, f"{self.accuracy(s, m):.3f}", f"{self.gain(s, m):+.3f}") for s, m in pairs]
        target_only = f"{self._mean([o.accuracy for o in self.baseline]):.3f}"
        table = [("source", "method", "accuracy", "gain"), ("none", self.baseline[0].method, target_only, ""), *rows]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table)

    def _of(self, method: str, source: str | None = None) -> list[Outcome]:
        found = [o for o in self.outcomes if o.method == method and source in (None, o.source)]
        if not found:
            raise InputError(f"no outcome of {method!r} with {source or 'any source'}: the study did not hold it")
        return found

    @staticmethod
    def _mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)


def source_study(
    methods: Sequence[Method],
    sources: Mapping[str, Any],
    target: Callable[[], nn.Module],
    data: Any,
    test: Any,
    *,
    baseline: Method | None = None,
    seeds: Sequence[int] = (0,),
    device: str | None = None,
    **training: Any,
) -> SourceStudy:
    """Train the target with every method from every source, and without any, and compare.

    Args:
        methods: each takes labelled data as its source.
        sources: by name, what `source=` takes in a transfer. Permuted names of classes are a variant, see
            :func:`transfuse.datasets.permuted_classes`; noise is another, see :func:`transfuse.datasets.noise`.
        target: builds the model; with one seed, all trainings start from the same weights.
        data: the target's; test: labelled, to measure accuracy on (transductive studies take the unlabelled part).
        baseline: trained once per seed, on the first source, to which it must be indifferent; `KTF(beta=0, mu=0)` by
            default.
        training: what :class:`~transfuse.core.training.Training` takes.

    `sources`, `data` and `test` may hold functions of the seed instead, for noise or labels that are drawn anew.

    Raises:
        InputError: there is no method or no source; the test data cannot be indexed; and what the methods raise.
    """
    if not methods or not sources:
        raise InputError(f"a study needs methods and sources, found {len(methods)} and {len(sources)}")
    outcomes, without = [], []

    def trained(method: Method, source: str, seed: int, only: float | None) -> Outcome:
        with rng.scope(rng.derive(seed, "target")):
            model = target()
        streams = {"data": as_data(_of_seed(data, seed)), "source": as_data(_of_seed(sources[source], seed))}
        options = Training(**training, seed=seed)
        trainer = Trainer(copy.deepcopy(method), {"target": model}, streams, options, sync=Sync(device))
        accuracy = _accuracy(trainer.fit(), as_data(_of_seed(test, seed)), method)
        terms = {name: term["raw"] for name, term in trainer.history[-1]["terms"].items()}
        gain = 0.0 if only is None else accuracy - only
        return Outcome("none" if only is None else source, repr(method), seed, accuracy, gain, terms)

    for seed in seeds:
        without.append(trained(baseline or KTF(beta=0, mu=0), next(iter(sources)), seed, None))
        only = without[-1].accuracy
        outcomes += [trained(method, source, seed, only) for source in sources for method in methods]
    return SourceStudy(outcomes, without)


def _of_seed(value: Any, seed: int) -> Any:
    return value(seed) if callable(value) else value


@torch.no_grad()
def _accuracy(model: nn.Module, test: Any, method: Method) -> float:
    if not isinstance(test, Indexed):
        raise InputError("the test data of a study must be a map-style data set or tensors")
    device, right = next(model.parameters()).device, 0
    model.eval()
    for rows in torch.arange(test.size).split(CHUNK):
        batch = test.fetch(rows).to(device)
        right += int(method.correct(find_logits(call(model, batch.inputs)), batch.labels).sum())
    return right / test.size

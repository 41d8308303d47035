"""What stands against what in a merge, found out before anything is written: names, shapes, ties, and ancestry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from transfuse.core.errors import InputError, ShapeError
from transfuse.weights.checkpoint import Checkpoint, Spec

RELATED = 0.1
"""Models whose weights have a smaller cosine have no common ancestor.

Networks that were initialised apart have cosines of their weight matrices within 0.02 of zero (measured on the small
networks of the tests, where they are largest); what was trained from a common start, even at length, stays above 0.4.
"""
SAMPLED, ENTRIES = 8, 2**16
"""Matrices that are looked at for ancestry, and entries of each."""
STATISTICS = ("running_mean", "running_var")
"""Buffers of batch normalisation: they are averaged, whatever the method does to weights."""


@dataclass(frozen=True)
class Ledger:
    """Every tensor of every parent, accounted for.

    Attributes:
        reference: the parent that says which tensors there are: the base, or the first model.
        merged: names that the method merges.
        averaged: running statistics of batch normalisation, which are averaged over the models.
        kept: integer and boolean tensors, which are the reference's.
        tied: names that stand for another tensor, with its name; they stay tied.
        dtypes: the types in which each parent keeps its floating-point tensors.
        cosines: for each pair of parents, the cosine of some of their weights.
        overlaps: for each pair of models, the cosine of what they have learned since the base.
        distances: for each model, the norm of what it has learned over that of the base, on the same weights.
    """

    reference: str
    merged: list[str]
    averaged: list[str]
    kept: list[str]
    tied: dict[str, str]
    dtypes: dict[str, list[str]]
    cosines: dict[str, float] = field(default_factory=dict)
    overlaps: dict[str, float] = field(default_factory=dict)
    distances: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What is written beside a merge."""
        return asdict(self)


def reconcile(base: Checkpoint | None, models: Sequence[Checkpoint], force: bool = False) -> Ledger:
    """Account for every tensor.

    Args:
        force: merge models that have no common ancestor.

    Raises:
        InputError: a parent lacks a tensor or has one more, or they have no common ancestor.
        ShapeError: tensors of one name have different shapes. The first five of all of these are named.
    """
    reference = models[0] if base is None else base
    others = [parent for parent in (base, *models) if parent is not None and parent is not reference]
    _require_equal(reference, others)
    floating = {k for k, spec in reference.tensors.items() if spec.dtype.is_floating_point}
    averaged = [k for k in reference.tensors if k in floating and k.rpartition(".")[2] in STATISTICS]
    ledger = Ledger(
        reference=reference.name,
        merged=[k for k in reference.tensors if k in floating and k not in set(averaged)],
        averaged=averaged,
        kept=[k for k in reference.tensors if k not in floating],
        tied=dict(reference.tied),
        dtypes={
            parent.name: sorted({str(parent.tensors[k].dtype).removeprefix("torch.") for k in floating})
            for parent in (reference, *others)
        },
        **_ancestry(base, models),
    )
    who, cosine = min(ledger.cosines.items(), key=lambda item: item[1], default=("", 1.0))
    if cosine < RELATED and not force:
        raise InputError(
            f"{who} share no ancestor: the cosine of their weights is {cosine:.3f}, and models that were trained from "
            f"a common start have far more than {RELATED}. What a merge of them says is babble; force=True (--force) "
            "merges them all the same"
        )
    return ledger


def _require_equal(reference: Checkpoint, others: Sequence[Checkpoint]) -> None:
    differences, shapes = [], False
    for parent in others:
        for key in (*reference.tensors, *(k for k in parent.tensors if k not in reference.tensors)):
            ours, theirs = (_spec(side, key) for side in (reference, parent))
            if key in reference.tied and key in parent.tensors:
                differences.append(
                    f"{key} is tied to {reference.tied[key]} in {reference.name}, its own in {parent.name}"
                )
            elif ours is None or theirs is None:
                where = "is missing in" if theirs is None else "stands only in"
                differences.append(f"{key} {where} {parent.name}")
            elif ours.shape != theirs.shape:
                shapes = True
                differences.append(f"{key} is {ours.shape} in {reference.name}, {theirs.shape} in {parent.name}")
    if differences:
        shown = "; ".join(differences[:5]) + (f"; ... ({len(differences)} in all)" if len(differences) > 5 else "")
        raise (ShapeError if shapes else InputError)(
            f"these models are not of one architecture: {shown}. Tensors are merged by name and shape"
        )


def _spec(side: Checkpoint, key: str) -> Spec | None:
    """Of a tensor, or of the one that it is tied to."""
    return side.tensors.get(side.tied.get(key, key))


def _ancestry(base: Checkpoint | None, models: Sequence[Checkpoint]) -> dict[str, dict[str, float]]:
    """Cosines between parents, and how far each model is from the base."""
    parents = [parent for parent in (base, *models) if parent is not None]
    samples = _samples(parents)
    if not len(samples[0]) or len(parents) < 2:
        return {}
    names = [parent.name for parent in parents]
    found = {"cosines": _cosines(names, samples)}
    if base is None:
        return found
    learned = [sample - samples[0] for sample in samples[1:]]
    size = max(float(samples[0].norm()), 1e-30)
    apart = {name: float(one.norm()) / size for name, one in zip(names[1:], learned, strict=True)}
    return found | {"overlaps": _cosines(names[1:], learned), "distances": apart}


def survival(base: Checkpoint, models: Sequence[Checkpoint], merged: Checkpoint) -> dict[str, float]:
    """How much of what each model has learned since the base is in the merge, on the weights that a ledger looks at.

    <merged - base, model - base> / ||model - base||^2          1: all, 0: nothing, below 0: the opposite
    """
    start, after, *samples = _samples([base, merged, *models])
    learned = [sample - start for sample in samples]
    shares = [float((after - start) @ one) / max(float(one @ one), 1e-30) for one in learned]
    return dict(zip((model.name for model in models), shares, strict=True))


def _samples(parents: Sequence[Checkpoint]) -> list[Tensor]:
    """The same entries of some matrices of each, flat and float32; empty where there are no matrices."""
    matrices = [k for k, s in parents[0].tensors.items() if s.dtype.is_floating_point and len(s.shape) > 1]
    chosen = matrices[:: math.ceil(len(matrices) / SAMPLED)] if matrices else []
    return [torch.cat([torch.empty(0), *(_some(parent.read(k)) for k in chosen)]) for parent in parents]


def _cosines(names: Sequence[str], vectors: Sequence[Tensor]) -> dict[str, float]:
    """Of every pair; 0 where one is zero."""
    norms = [max(float(vector.norm()), 1e-30) for vector in vectors]
    pairs = combinations(range(len(vectors)), 2)
    return {f"{names[i]} and {names[j]}": float(vectors[i] @ vectors[j]) / norms[i] / norms[j] for i, j in pairs}


def _some(tensor: Tensor) -> Tensor:
    """Entries from all over a tensor, float32."""
    flat = tensor.flatten()
    return flat[:: max(1, flat.numel() // ENTRIES)].float()

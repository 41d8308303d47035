"""AXIS: do the strongest directions of eight tuned models, and a few tuned singular values, read new fonts?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from proofs.study import Study
from proofs.weights._letters import LETTERS, PLAIN, SIDE, Pair, accuracy, base, frozen_head, learned, pictures, split
from transfuse.datasets.fonts import faces
from transfuse.datasets.glyphs import draw
from transfuse.distill import Labels
from transfuse.weights import ATLAS, AXIS, Linear

MODELS, FACES, SHOTS = 8, 6, 2
TRAINING: dict[str, Any] = {"steps": 80, "batch_size": 52, "lr": 0.1, "clip": 1.0}
COEFFICIENTS = {**TRAINING, "weight_decay": 0.1}


@cache
def groups() -> list[Pair]:
    """Letters in disjoint groups of training faces that are not plain."""
    drawn = draw("latin", "", SIDE, copies=2)
    plain = {(f.family, f.name) for f in faces(PLAIN)}
    mine = [i for i, f in enumerate(drawn.faces) if f.part == "train" and (f.family, f.name) not in plain]
    found = []
    for group in range(MODELS):
        own = torch.tensor(mine[group::MODELS][:FACES])
        rows = torch.isin(drawn.face, own)
        found.append((drawn.images[rows].unsqueeze(1).float() / 255, drawn.labels[rows]))
    return found


@cache
def pool(smoke: bool) -> list[nn.Module]:
    """The base tuned to each group, its head as it was."""
    start = frozen_head(base(smoke))
    return [learned(Labels(), None, start, data, smoke, seed=0, steps=80, lr=2e-3) for data in groups()]


@torch.no_grad()
def damaged(models: list[nn.Module], start: nn.Module, how: str) -> list[nn.Module]:
    """One model of them with noise of 0.5 ||D||_F in every entry of its matrices, or all with 90 % of D removed."""
    models = [copy.deepcopy(model) for model in models]
    generator = torch.Generator().manual_seed(0)
    for model in models[:1] if how == "noise" else models:
        for p, own in zip(model.parameters(), start.parameters(), strict=True):
            change = p - own
            if p.dim() < 2 or not change.any():
                continue
            if how == "noise":
                p.add_(0.5 * change.norm() * torch.randn(p.shape, generator=generator))
            else:
                limit = change.abs().flatten().kthvalue(round(0.9 * change.numel())).values
                p.copy_(own + torch.where(change.abs() > limit, change, 0))
    return models


def arms(start: nn.Module, smoke: bool) -> dict[str, tuple[Any, list[nn.Module]]]:
    """Every arm's method and sources; AXIS at 40 % trains 22 numbers, so does aTLAS (two per tensor)."""
    models = pool(smoke)
    best = max(models, key=lambda m: accuracy(m, pictures("latin", "", "validate")))
    found: dict[str, tuple[Any, list[nn.Module]]] = {
        "AXIS": (AXIS(0.5, 0.4), models),
        "average, tuned": (AXIS(tuned=0.4, merge=Linear()), models),
        "base, tuned": (AXIS(tuned=0.4, merge="base"), models),
        "best source, tuned": (AXIS(1.0, tuned=0.4), [best]),
        "aTLAS": (ATLAS(budget=2), models),
        "AXIS 10 %": (AXIS(0.5), models),
        "AXIS 10 %, bottom": (AXIS(0.5, order="bottom"), models),
    }
    for how in ("noise", "pruned"):
        found[f"AXIS, {how}"] = (AXIS(0.5, 0.4), damaged(models, start, how))
        found[f"aTLAS, {how}"] = (ATLAS(budget=2), damaged(models, start, how))
    return found


def trial(seed: int, smoke: bool, part: str = "test") -> Mapping[str, float]:
    """Two drawings of each letter in new fonts to learn from, all others to test on."""
    start = base(smoke)
    few, rest = split(pictures("latin", "", part, copies=2), SHOTS, seed)
    if smoke:
        rest = (rest[0][:128], rest[1][:128])
    assert len(few[1]) == SHOTS * LETTERS
    found = {"base": accuracy(start, rest)}
    for arm, (method, models) in arms(start, smoke).items():
        training = COEFFICIENTS if isinstance(method, ATLAS) else TRAINING
        found[arm] = accuracy(learned(method, models, start, few, smoke, seed, **training), rest)
    return {arm: found[arm] for arm in ARMS}


ARMS = (
    "AXIS",
    "base, tuned",
    "average, tuned",
    "best source, tuned",
    "aTLAS",
    "base",
    "AXIS 10 %",
    "AXIS 10 %, bottom",
    "AXIS, noise",
    "aTLAS, noise",
    "AXIS, pruned",
    "aTLAS, pruned",
)
PROOF = Study(
    name="axis",
    proves=("AXIS",),
    data=(
        "capital letters at 14x14 pixels: two drawings of each in the faces of unseen fonts to learn from, all others "
        "(about 1,600) to test on. The base reads plain fonts; eight copies of it were tuned to disjoint groups of six "
        "other faces each, with its head"
    ),
    trial=trial,
    arms=ARMS,
    baseline="base, tuned",
    metric="accuracy",
    expected=(
        "AXIS above the base whose own singular values are tuned, and not more than a point below the tuned average. "
        "Top singular values better than the bottom ones at 10 %. With one noisy source, or pruned ones, AXIS loses "
        "less than aTLAS"
    ),
    notes="",
)

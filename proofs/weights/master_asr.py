"""Master-ASR: lines of letters in four alphabets, read column by column; then two new alphabets from 64 lines each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from proofs.runner import SMOKE_STEPS
from proofs.study import Numbers, Study
from proofs.weights._letters import SIDE
from transfuse import transfer
from transfuse.core import rng
from transfuse.datasets.glyphs import SCRIPTS, draw
from transfuse.losses import IGNORE
from transfuse.models.transformer import Block
from transfuse.weights import MasterASR
from transfuse.weights.master_asr import Artisan

SOURCES, NEW = ("latin", "latin-small", "greek", "cyrillic"), ("greek-small", "cyrillic-small")
LINES, FEW, TESTED, SHORTEST, LONGEST = 1500, 64, 150, 3, 5
WIDTH, DEPTH = 64, 2
CLASSES = 1 + max(len(letters) for letters in SCRIPTS.values())
DENSE: dict[str, Any] = {"experts": 1, "sparsity": 0.0, "gamma": 10**9}
"""No mask, and never a turn of the scores: an encoder that all share, and an output layer for each."""
Lines = dict[str, Tensor]


class Recogniser(nn.Module):
    """Columns `(batch, columns, 14)`, two convolutions of stride 2, blocks of attention, logits of every frame."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv1d(SIDE, WIDTH, 5, 2, 2), nn.ReLU(), nn.Conv1d(WIDTH, WIDTH, 5, 2, 2), nn.ReLU()
        )
        self.blocks = nn.ModuleList(Block(WIDTH, 4) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.conv(inputs.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@cache
def lines(script: str, part: str, count: int, seed: int) -> Lines:
    """Lines of random letters, each line in one face, blank columns behind them."""
    drawn = draw(script, "", SIDE)
    faces = [i for i, face in enumerate(drawn.faces) if face.part == part and (drawn.face == i).sum() > LONGEST]
    generator = torch.Generator().manual_seed(rng.derive(seed, script, part))
    inputs = torch.zeros(count, SIDE * LONGEST, SIDE)
    labels = torch.full((count, LONGEST), IGNORE)
    for n in range(count):
        face = faces[int(torch.randint(len(faces), (), generator=generator))]
        mine = (drawn.face == face).nonzero().flatten()
        length = int(torch.randint(SHORTEST, LONGEST + 1, (), generator=generator))
        chosen = mine[torch.randint(len(mine), (length,), generator=generator)]
        inputs[n, : SIDE * length] = torch.cat(list(drawn.images[chosen].float() / 255), 1).T
        labels[n, :length] = drawn.labels[chosen] + 1
    return {"inputs": inputs, "labels": labels}


def learned(
    method: MasterASR, target: nn.Module, data: Mapping[str, Lines], smoke: bool, seed: int, **how: Any
) -> Artisan:
    """What a method makes of the target."""
    if smoke:
        how["steps"] = SMOKE_STEPS
    model = transfer(
        method, None, target, dict(data), seeds=[seed], task="token-classification", batch_size=32, **how
    ).model
    assert isinstance(model, Artisan)
    return model


def distance(one: list[int], other: list[int]) -> int:
    """Fewest insertions, deletions and replacements between two transcripts."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


@torch.no_grad()
def error_rate(model: nn.Module, data: Lines) -> float:
    """Character error rate of the best path."""
    best = model.eval()(data["inputs"]).argmax(-1)
    wrong = total = 0
    for path, labels in zip(best, data["labels"], strict=True):
        found = [c for c in path.unique_consecutive().tolist() if c]
        truth = [c for c in labels.tolist() if c != IGNORE]
        wrong, total = wrong + distance(found, truth), total + len(truth)
    return wrong / total


def known(model: Artisan, part: str, smoke: bool) -> float:
    """Average over the alphabets of stage 1."""
    found = [error_rate(model.of(s), lines(s, part, TESTED if not smoke else 16, 99)) for s in SOURCES]
    return sum(found) / len(found)


def trial(seed: int, smoke: bool, part: str = "test") -> Mapping[str, Numbers]:
    many, few, tested = (64, 32, 16) if smoke else (LINES, FEW, TESTED)
    train = {s: lines(s, "train", many, 0) for s in SOURCES}
    with rng.scope(seed):
        fresh = Recogniser()
    joint = learned(MasterASR(**DENSE), fresh, train, smoke, seed, steps=2000, lr=2e-3)
    further = learned(MasterASR(**DENSE), joint.body, train, smoke, seed, steps=1500, lr=1e-3)
    master = learned(MasterASR(gamma=125), joint.body, train, smoke, seed, steps=1500, lr=1e-3)
    rows = torch.cat([p.detach().sigmoid() for p in master.rows.parameters()])
    found: dict[str, dict[str, float]] = {
        OURS: {"error of known alphabets": known(master, part, smoke), "deviation of T": float(rows.std())},
        HEAD: {"error of known alphabets": known(further, part, smoke)},
    }
    size = sum(p.numel() for p in fresh.parameters())
    head = sum(p.numel() for p in fresh.head.parameters())
    counts = {OURS: head + len(master.layers) * master.experts, HEAD: head, FULL: size, SCRATCH: size}
    plans: dict[str, tuple[MasterASR, nn.Module, float]] = {
        OURS: (MasterASR(), master, 3e-3),
        HEAD: (MasterASR(), further, 3e-3),
        FULL: (MasterASR(**DENSE), further.body, 1e-3),
        SCRATCH: (MasterASR(**DENSE), fresh, 1e-3),
    }
    for arm, (method, start, lr) in plans.items():
        errors = []
        for script in NEW:
            data = {script: lines(script, "train", few, seed)}
            model = learned(method, start, data, smoke, seed, steps=300, lr=lr)
            errors.append(error_rate(model.of(script), lines(script, part, tested, 99)))
        found.setdefault(arm, {})
        found[arm] |= {"character error rate": sum(errors) / len(errors), "trainable parameters": counts[arm]}
    return found


OURS = "MasterASR: row of T and output layer"
HEAD = "output layer on the dense encoder"
FULL = "all of the dense encoder"
SCRATCH = "from scratch"
PROOF = Study(
    name="master_asr",
    proves=("MasterASR",),
    data=(
        "not speech: lines of 3 to 5 random letters at 14 pixels, read column by column as frames (18 after two "
        "convolutions), so CTC must align them. Four alphabets with 1,500 lines each in place of 51 languages, then "
        "small Greek and small Cyrillic letters with 64 lines each; tested on 150 lines in fonts of other families. "
        "Two blocks of width 64, trained jointly for 2,000 updates, then 1,500 with K = 8, 30 % of the masked weights "
        "removed and turns of 125 updates, or 1,500 dense; 300 updates for a new alphabet"
    ),
    trial=trial,
    arms=(OURS, HEAD, FULL, SCRATCH),
    baseline=HEAD,
    metric="character error rate",
    higher_is_better=False,
    expected=(
        "lower error on the new alphabets than the output layer alone, with 32 more trainable numbers; on the known "
        "ones within a point of the dense encoder that trained as long. All weights or scratch: no claim at "
        "this size. No setting was tuned"
    ),
    notes=(
        "A first run with a third of the budget was undertrained: known alphabets had an error of 0.28 (dense) and "
        "0.38. Now the sparse network, without 30 % of its masked weights, reads them within a point of the dense one "
        "(0.065 to 0.060), as expected. On new alphabets rows of T are no better than the output layer alone (0.249 "
        "to 0.239), and neither are all weights (0.234): with 64 lines each, the encoder that reads four alphabets is "
        "good enough as it is, and eight masks that differ little (deviation of sigmoid(T) 0.05) leave little to "
        "select. From scratch nothing is read (0.86)."
    ),
)

"""LoRAShear: does it matter which heads and channels go, that they fade, and what the rest recovers from?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from proofs.proof import Trained
from proofs.runner import SMOKE_STEPS, trained
from proofs.small_llama import kinds, llama
from proofs.study import Study
from transfuse import transfer
from transfuse.core.run import Run
from transfuse.core.streams import as_data
from transfuse.datasets import Splits
from transfuse.evaluation import evaluate
from transfuse.weights import LoRAShear
from transfuse.weights.structures import Node

WINDOWS, HELD_OUT, SMOKE = 3000, 150, 8
TRAINING: dict[str, Any] = {"steps": 120, "batch_size": 16, "lr": 3e-3, "clip": 1.0}


def everything() -> Splits:
    """All kinds of text in one."""
    text = torch.cat([parts["train"] for parts in kinds(WINDOWS, HELD_OUT).values()])
    return Splits({"input_ids": text}, None, None, name="four kinds of text", task="language-model")


FULL = Trained(
    build=lambda: llama(64, 3, 4, 160),
    splits=everything,
    training={"steps": 450, "batch_size": 24, "lr": 3e-3, "warmup": 30, "clip": 1.0},
)


class RandomGroups(LoRAShear):
    """What goes is drawn at random."""

    def importance(self, nodes: Sequence[Node], params: Mapping[str, Tensor], run: Run) -> Tensor:
        return torch.rand(sum(n.count for n in nodes), generator=run.shared_rng("random", nodes[0].kind))


def arms(steps: int) -> dict[str, LoRAShear]:
    """All with the same number of updates; whoever prunes at once, before anything is learned, recovers for longer."""
    same: dict[str, Any] = {"share": 0.3, "rounds": 3, "held_out": 32}
    at_once: dict[str, Any] = {"warmup": 0.0, "prune": 1 / steps, "periods": 1}
    return {
        "LHSPG, dynamic recovery": LoRAShear(**same, periods=3),
        "LHSPG, uniform recovery": LoRAShear(**same, periods=3, floor=1.0),
        "LHSPG, no recovery": LoRAShear(**same, periods=3, warmup=0.2, prune=0.8),
        "magnitude at once, recovery": LoRAShear(**same, **at_once, weights=(1, 0, 0, 0, 0)),
        "random at once, recovery": RandomGroups(**same, **at_once),
    }


def trial(seed: int, smoke: bool) -> dict[str, dict[str, float]]:
    """Nats per byte, the mean over four kinds of held-out text, and by how much the worst is above the full model's."""
    return pruned(seed, "test", smoke)


def pruned(seed: int, part: str, smoke: bool, **given: Any) -> dict[str, dict[str, float]]:
    """Every arm from the same full model."""
    text, model = kinds(WINDOWS, HELD_OUT), trained(FULL, smoke)
    data = {name: {"input_ids": parts["train"]} for name, parts in text.items()}
    test = {name: {"input_ids": parts[part][: SMOKE if smoke else None]} for name, parts in text.items()}
    training = {**TRAINING, **given, **({"steps": 4 * SMOKE_STEPS, "batch_size": 4} if smoke else {})}
    before = _full(model, part, smoke)
    found = {}
    for name, method in arms(training["steps"]).items():
        result = transfer(method, None, model, data, test=test, seeds=[seed], task="language-model", **training)
        nll = result.report.method_arm.runs[0].sets
        left = sum(p.numel() for p in result.model.parameters()) / sum(p.numel() for p in model.parameters())
        gaps = {kind: nll[kind] - before[kind] for kind in nll}
        found[name] = {
            "nll": fmean(nll.values()),
            "worst gap": max(gaps.values()),
            "parameters left": left,
            **{f"nll of {kind}": value for kind, value in nll.items()},
        }
    return found


@cache
def _full(model: nn.Module, part: str, smoke: bool) -> dict[str, float]:
    """The full model's loss on every kind of text."""
    text = kinds(WINDOWS, HELD_OUT)
    rows = {name: {"input_ids": parts[part][: SMOKE if smoke else None]} for name, parts in text.items()}
    return {
        name: evaluate(model, as_data(few), task="language-model", batch_size=64).metrics["nll"]
        for name, few in rows.items()
    }


PROOF = Study(
    name="lorashear",
    proves=("LoRAShear",),
    data=(
        "source code of CPython's library, its documentation, German and French manual pages in windows of 64 bytes: "
        "3,000 of each to train on, 150 to test. The full model is a Llama of 3 layers, width 64, 4 heads and 160 "
        "channels, trained on all four; 30 % of heads and of channels go"
    ),
    trial=trial,
    arms=tuple(arms(2)),
    baseline="magnitude at once, recovery",
    metric="nll",
    higher_is_better=False,
    expected=(
        "LHSPG with recovery below magnitude at once, and that below random; a dynamic mixture has a smaller worst gap "
        "than a uniform one, perhaps within noise"
    ),
    seeds=(0, 1, 2),
)

"""Dynamic logit fusion: can a small tuned model move a large frozen one, byte by byte, without training it?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from proofs.proof import Trained
from proofs.runner import SMOKE_STEPS, trained
from proofs.small_text import CONTEXT, TEACHER, TRAINING, small_text, student
from proofs.study import Numbers, Study
from transfuse import transfer
from transfuse.distill import Labels
from transfuse.infer import DynamicFusion, Fusion, StaticFusion

METHOD, PROXY = DynamicFusion(), StaticFusion()
BASE = Trained(build=student, splits=small_text, training={**TRAINING, "steps": 900})
"""The small model that experts are tuned from; the large one is the teacher of other proofs, of the same text."""
TUNING = {"steps": 250, "batch_size": 32, "lr": 2e-3, "warmup": 20, "clip": 1.0}
"""Of experts."""
LARGE_TUNING = {"steps": 150, "batch_size": 32, "lr": 1e-3, "warmup": 20, "clip": 1.0}
"""Of the whole large model, which is what fusion saves."""
CONSTANTS = [i / 10 for i in range(21)]


class Text(NamedTuple):
    """Windows of bytes, `(windows, context)`."""

    train: Tensor
    validate: Tensor
    test: Tensor


def cut(text: bytes) -> Text:
    """The first 450 KB as windows that do not overlap: 6,400 to train on, 200 to choose by, 250 to test."""
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: 7000 * CONTEXT].long()
    windows = windows[: len(windows) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return Text(windows[:6400], windows[6400:6600], windows[-250:])


@cache
def domains() -> dict[str, Text]:
    """Prose and code that every installation of Python and torch brings along."""
    headers = sorted((Path(torch.__file__).parent / "include" / "c10").rglob("*.h"))
    return {
        "documentation": cut("\n".join(topics.topics.values()).encode()),
        "headers": cut(b"".join(path.read_bytes() for path in headers)),
    }


@torch.no_grad()
def said(model: nn.Module, windows: Tensor) -> Tensor:
    """Logits of every byte but the first, `(bytes, 256)`."""
    return torch.cat([model.eval()(w)[:, :-1] for w in windows.split(64)]).flatten(0, 1)


def score(logits: Tensor, windows: Tensor) -> dict[str, float]:
    """Bits per byte and accuracy."""
    labels = windows[:, 1:].flatten()
    bits = nn.functional.cross_entropy(logits, labels) / math.log(2)
    return {"bits_per_byte": float(bits), "accuracy": float((logits.argmax(-1) == labels).float().mean())}


def bits(method: Fusion, models: Sequence[nn.Module], windows: Tensor) -> float:
    """Of a large model, a base and experts that are fused."""
    large, base, *experts = (said(model, windows) for model in models)
    return score(method.fuse(large, base, experts).logits, windows)["bits_per_byte"]


def best_constant(models: Sequence[nn.Module], windows: Tensor) -> float:
    """The one weight that would have been best."""
    large, base, *experts = (said(model, windows) for model in models)
    found = {a: score(StaticFusion(a).fuse(large, base, experts).logits, windows) for a in CONSTANTS}
    return min(found, key=lambda a: found[a]["bits_per_byte"])


def mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Over domains."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def trial(seed: int, smoke: bool) -> Mapping[str, Numbers]:
    """The large model and the small one are the same for all seeds; every tuning is a seed's own."""
    general, texts = small_text(), domains()
    if smoke:
        texts = {name: Text(*(part[:32] for part in text)) for name, text in texts.items()}

    def learn(model: Any, data: Any, training: Mapping[str, Any]) -> nn.Module:
        steps = {"steps": SMOKE_STEPS} if smoke else {}
        options = {"seeds": [seed], "task": "language-model", **training, **steps}
        return transfer(Labels(), target=model, data=data, **options).model

    large = trained(TEACHER, smoke)
    base = trained(BASE, smoke)
    experts = {name: learn(base, text.train, TUNING) for name, text in texts.items()}
    tuned = {name: learn(large, text.train, LARGE_TUNING) for name, text in texts.items()}

    rows: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for name, text in texts.items():
        models = [large, base, experts[name]]
        logits = [said(model, text.test) for model in models]
        constant = StaticFusion(best_constant(models, text.validate))
        methods: dict[str, Fusion] = {repr(METHOD): METHOD, repr(PROXY): PROXY, "best constant": constant}
        answers = {arm: method.fuse(logits[0], logits[1], logits[2:]) for arm, method in methods.items()}
        others = {"small expert": logits[2], "small base": logits[1], "large base": logits[0]}
        others["large fine-tuned"] = said(tuned[name], text.test)
        scores = {arm: score(fused.logits, text.test) for arm, fused in answers.items()}
        scores |= {arm: score(found, text.test) for arm, found in others.items()}
        start, end = (scores[arm]["bits_per_byte"] for arm in ("large base", "large fine-tuned"))
        for arm, of_arm in scores.items():
            reached = of_arm["bits_per_byte"]
            alpha = {"alpha": float(answers[arm].alpha.mean())} if arm in answers else {}
            rows[arm].append({**of_arm, name: reached, "gap_closed": (reached - start) / (end - start), **alpha})
    result = {arm: {**{n: v for row in rows[arm] for n, v in row.items()}, **shared(rows[arm])} for arm in ARMS}

    # A text of both domains, with both experts at hand and nobody to say which one is meant.
    def mixed(method: Fusion, names: Sequence[str]) -> float:
        return sum(bits(method, [large, base, *(experts[n] for n in names)], t.test) for t in texts.values()) / 2

    result[repr(METHOD)]["mixed"] = mixed(METHOD, list(texts))
    result[repr(PROXY)]["mixed"] = mixed(PROXY, list(texts))
    result[repr(METHOD)]["mixed_with_one"] = min(mixed(METHOD, [name]) for name in texts)
    result["small expert"]["mixed"] = min(
        mean([score(said(expert, text.test), text.test) for text in texts.values()])["bits_per_byte"]
        for expert in experts.values()
    )
    assert isinstance(general.test, TensorDataset)
    test = general.test.tensors[0][: 16 if smoke else 250]
    for arm, model in (("large base", large), ("small base", base)):
        result[arm]["own_text"] = score(said(model, test), test)["bits_per_byte"]
    return result


def shared(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over domains of what every domain has."""
    return mean([{n: v for n, v in row.items() if n in rows[0] and n in rows[-1]} for row in rows])


ARMS = (
    repr(METHOD),
    repr(PROXY),
    "best constant",
    "small expert",
    "small base",
    "large base",
    "large fine-tuned",
)
PROOF = Study(
    name="dynamic_fusion",
    proves=("DynamicFusion", "StaticFusion"),
    data=(
        "a large and a small model of CPython's source; experts of Python's documentation and of C++ headers; 6,400 "
        "windows of 64 bytes each to tune on, 200 to choose the constant by, 250 to test"
    ),
    trial=trial,
    arms=ARMS,
    baseline=repr(PROXY),
    metric="bits_per_byte",
    higher_is_better=False,
    expected=(
        "bits per byte, mean over domains: the large base is better than the small base on their own text and worse "
        "than the small expert on the domains; dynamic is at or below alpha = 1, near the best constant, and below the "
        "small expert on the documentation, which is nearer to what the large model knows; the large fine-tuned model "
        "is best. On mixed text two experts, one chosen per byte, beat any one. How much of the gap closes (96% in the "
        "paper) cannot be expected at this size"
    ),
    seeds=(0, 1, 2),
)

"""Synthetic reports: a full one, one of language models, and the least that a report can hold."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from transfuse.report import Report

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def interval(mean: float, half: float, **more: Any) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "confidence": 0.95, **more}


def curve(rng: random.Random, end: float, terms: list[str], higher: bool, steps: int) -> list[dict[str, Any]]:
    points = []
    for step in range(10, steps + 1, 10):
        done = step / steps
        parts = {
            name: {
                "raw": (2.4 - i) * math.exp(-2.5 * done) + 0.12 + rng.uniform(0, 0.08),
                "weighted": (1.0, 0.3)[i] * ((2.4 - i) * math.exp(-2.5 * done) + 0.12 + rng.uniform(0, 0.08)),
                "gradient_norm": (1.0, 0.06)[i] * (math.exp(-done) + rng.uniform(0, 0.1)),
            }
            for i, name in enumerate(terms)
        }
        start = 0.1 if higher else end + 1.4
        reached = end + (start - end) * math.exp(-5 * done) + rng.gauss(0, 0.004)
        points.append(
            {
                "step": step,
                "epoch": 10 * done,
                "loss": sum(part["weighted"] for part in parts.values()),
                "terms": parts,
                "validate": reached if step % 50 == 0 else None,
            }
        )
    return points


def arm(
    rng: random.Random,
    name: str,
    role: str,
    value: float,
    gain: dict[str, Any] | None,
    verdict: str | None,
    metrics: dict[str, float],
    terms: list[str],
    higher: bool = True,
    seeds: int = 3,
) -> dict[str, Any]:
    runs = []
    for seed in range(seeds):
        own = value + rng.gauss(0, 0.003)
        runs.append(
            {
                "seed": seed,
                "value": own,
                "seconds": 84 + rng.uniform(-4, 4),
                "steps": 600,
                "metrics": {key: v + rng.gauss(0, 0.004) for key, v in metrics.items()},
                "sets": {"old": own, "new": own},
                "stages": [{"old": own, "new": 0.1}, {"old": own, "new": own}],
                "curve": curve(rng, own, terms, higher, 600),
                "warnings": [],
            }
        )
    return {
        "name": name,
        "role": role,
        "verdict": verdict,
        "gain": gain,
        "value": interval(value, 0.006),
        "runs": runs,
        "per_class": None,
        "calibration": None,
    }


def reliability(rng: random.Random, slack: float) -> dict[str, list[Any]]:
    confidence = [(i + 0.5) / 10 for i in range(10)]
    return {
        "confidence": [None, *confidence[1:]],
        "accuracy": [None, *(max(0.0, min(1.0, c - slack * c + rng.gauss(0, 0.02))) for c in confidence[1:])],
        "count": [0, *(int(20 * math.exp(4.4 * c)) for c in confidence[1:])],
    }


def common(task: str, metric: str, higher: bool) -> dict[str, Any]:
    return {
        "format": 1,
        "created": "2026-11-21T21:30:00+00:00",
        "task": task,
        "metric": metric,
        "higher_is_better": higher,
        "recipe": {
            "method": {"kd": {"temperature": 4.0, "weight": 0.9}},
            "source": "teacher.safetensors",
            "target": {"model": "small-cnn", "width": 16},
            "data": {"train": "data/train.parquet", "validate": "data/validate.parquet"},
            "epochs": 10,
            "seeds": [0, 1, 2],
            "compare": ["scratch", "shuffled teacher"],
        },
        "versions": {"transfuse": "0.1.0", "torch": "2.13.0", "python": "3.12.4", "numpy": "2.3.1"},
        "machine": {"cpu": "AMD EPYC 7B13", "cores": 2, "memory_gb": 15.6, "system": "Linux 6.1"},
        "commit": "2e6ee64",
    }


@pytest.fixture(scope="session")
def classification() -> dict[str, Any]:
    """Distillation of a classifier, three seeds, two arms to compare with, as the content of the file."""
    rng = random.Random(0)
    arms = [
        arm(
            rng,
            "KD",
            "method",
            0.912,
            interval(0.0214, 0.0061, against="scratch"),
            "arrived",
            {"accuracy": 0.912, "agreement": 0.934, "kl": 0.0921, "ece": 0.0213, "nll": 0.284},
            ["kd", "cross entropy"],
        ),
        arm(
            rng,
            "scratch",
            "baseline",
            0.8906,
            None,
            None,
            {"accuracy": 0.8906, "agreement": 0.896, "kl": 0.2874, "ece": 0.0687, "nll": 0.391},
            ["cross entropy"],
        ),
        arm(
            rng,
            "shuffled teacher",
            "control",
            0.8871,
            interval(-0.0035, 0.0058, against="scratch"),
            "no effect",
            {"accuracy": 0.8871, "agreement": 0.891, "kl": 0.4102, "ece": 0.0481, "nll": 0.432},
            ["kd", "cross entropy"],
        ),
    ]
    for one, slack in zip(arms, (0.02, 0.13, -0.08), strict=True):
        one["calibration"] = reliability(rng, slack)
        one["per_class"] = [one["value"]["mean"] + rng.gauss(0, 0.03) for _ in CLASSES]
    arms[1]["runs"][2]["warnings"] = ["the learning rate warm-up covers 40 % of the run"]
    matrix = [[int(rng.expovariate(0.4)) if r != c else 930 for c in range(10)] for r in range(10)]
    matrix[3][5], matrix[5][3], matrix[1][9] = 41, 33, 22
    model = {"parameters": 11_173_962, "bytes": 44_695_848, "flops": 556_000_000.0, "latency_ms": 6.42}
    small = {"parameters": 1_083_466, "bytes": 4_333_864, "flops": 61_300_000.0, "latency_ms": 1.38}
    return {
        **common("classification", "accuracy", True),
        "name": "CIFAR-10: ResNet-18 to a small CNN",
        "method": "KD(temperature=4)",
        "verdict": "arrived",
        "why": "KD beats the same student trained from scratch with every seed, and a shuffled teacher gives "
        "nothing: what the teacher knows is what helped.",
        "gain": arms[0]["gain"],
        "arms": arms,
        "source": {"name": "ResNet-18", "value": 0.9487, "metrics": {"ece": 0.0312, "nll": 0.182}},
        "classes": CLASSES,
        "per_class_gain": [
            {"class": name, "gain": g, "low": g - 0.019, "high": g + 0.019, "count": 1000}
            for name, g in ((name, rng.gauss(0.02, 0.022)) for name in CLASSES)
        ],
        "disagreement": {"matrix": matrix},
        "panels": [],
        "cost": {"source": model, "target": small},
        "warnings": ["Only 3 seeds: the interval over seeds is wide."],
    }


@pytest.fixture(scope="session")
def language_model() -> dict[str, Any]:
    """Distillation of a language model that made it worse; lower is better and nothing has classes."""
    rng = random.Random(1)
    arms = [
        arm(
            rng,
            "TAID",
            "method",
            1.284,
            interval(-0.041, 0.012, against="finetune"),
            "negative transfer",
            {"agreement": 0.611, "kl": 0.412},
            ["taid"],
            higher=False,
            seeds=2,
        ),
        arm(
            rng,
            "finetune",
            "baseline",
            1.243,
            None,
            None,
            {"agreement": 0.588, "kl": 0.533},
            ["cross entropy"],
            higher=False,
            seeds=2,
        ),
    ]
    return {
        **common("language-model", "bits per byte", False),
        "name": "Shakespeare, 10 M to 2 M",
        "method": "TAID(start=0.4)",
        "verdict": "negative transfer",
        "why": "The distilled model needs more bits than the one fine-tuned without a teacher.",
        "gain": arms[0]["gain"],
        "arms": arms,
        "source": {"name": "GPT 10 M", "value": 1.102, "metrics": {}},
        "classes": None,
        "per_class_gain": None,
        "disagreement": None,
        "cost": {
            "source": {"parameters": 10_200_000, "bytes": 40_800_000, "flops": None, "latency_ms": 21.3},
            "target": {"parameters": 2_050_000, "bytes": 8_200_000, "flops": None, "latency_ms": 4.9},
        },
        "warnings": [],
    }


@pytest.fixture(scope="session")
def minimal() -> dict[str, Any]:
    """One run of one arm, compared with nothing."""
    return {
        **common("classification", "accuracy", True),
        "name": "digits",
        "method": "KD(temperature=2)",
        "verdict": "not compared",
        "why": "No baseline was asked for: pass compare=['scratch'] to learn whether the teacher helped.",
        "arms": [
            {
                "name": "KD",
                "role": "method",
                "value": interval(0.953, 0.011),
                "runs": [{"seed": 0, "value": 0.953, "seconds": 3.2, "steps": 100}],
            }
        ],
        "cost": {
            "source": None,
            "target": {"parameters": 650, "bytes": 2600, "flops": None, "latency_ms": 0.02},
        },
        "commit": None,
    }


@pytest.fixture(scope="session", params=["classification", "language_model", "minimal"])
def report(request: pytest.FixtureRequest) -> Report:
    """Each of the three, as a report."""
    return Report.model_validate(request.getfixturevalue(request.param))

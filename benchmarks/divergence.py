"""The fused divergences over the matrix products that they cannot do without, and over those of others.

One comparison is one update's loss: value and gradients by the hidden states and the output layer's weight, for 2,048
tokens and a vocabulary of 49,152, the sizes of SmolLM2-135M. The four products are the student's logits, the teacher's,
and the two of the student's gradients. Memory is the growth of the resident set beyond inputs and gradients, at its
peak, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Result, alternate, no_garbage_collection
from transfuse.losses import Divergence, Projection, Sampled, match

TOKENS, VOCABULARY, WIDTH = 2048, 49152, 576
KINDS = {
    "forward KL": (Divergence(), 1.35),
    "reverse KL": (Divergence("reverse"), 1.5),
    "Jensen-Shannon": (Divergence("jensen_shannon", 0.5), 1.8),
    "TAID": (Divergence("interpolated", 0.4), 1.5),
    "skew KL": (Divergence("skew", 0.1), 1.8),
}


def measure(repeats: int | None = None, smoke: bool = False) -> Result:
    """Run every comparison."""
    tokens, vocabulary, width = (64, 512, 32) if smoke else (TOKENS, VOCABULARY, WIDTH)
    repeats = repeats or (1 if smoke else 5)
    result = Result("divergence")
    student, teacher = sides(tokens, vocabulary, width)
    for name, (divergence, limit) in KINDS.items():
        ours = timed(lambda d=divergence: fused(student, teacher, d))  # type: ignore[misc]
        pairs = alternate(ours, timed(lambda: products(student, teacher)), repeats)
        result.add(f"{name} / four matrix products", limit, pairs)
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(2))
    mixed = timed(lambda: fused(student, teacher, Divergence(), labels))
    result.add("forward KL and labels / four matrix products", 1.5, alternate(mixed, _four(student, teacher), repeats))
    plain = timed(lambda: dense(student, teacher))
    result.add("forward KL / plain kl_div", 1.0, alternate(_kl(student, teacher), plain, max(1, repeats // 2)))
    drawn = sampled(teacher)
    few = timed(lambda: fused(student, drawn, Divergence()))
    hard = timed(lambda: cross_entropy(student, labels))
    result.add("sampled target / plain cross-entropy", 1.1, alternate(few, hard, repeats))
    if importlib.util.find_spec("trl") is None:
        print("trl is not installed: not compared with it")
    else:
        ours = timed(lambda: fused(student, teacher, Divergence("jensen_shannon", 0.5)))
        theirs = timed(lambda: trl_jsd(student, teacher))
        result.add("Jensen-Shannon / TRL's", 1 / 3.5, alternate(ours, theirs, max(1, repeats // 2)))
    few_tokens, many_tokens = (64, 128) if smoke else (TOKENS, 8 * TOKENS)
    extra = [peak(n, vocabulary, width) for n in (few_tokens, many_tokens)]
    # A ratio to what is allowed, since a result is made of ratios: megabytes over 200, and many tokens over few.
    result.add("extra memory / 200 MB", 1.0, [(extra[1], 200.0)])
    result.add("extra memory, 16k tokens / 2k", 1.1, [(extra[1], extra[0])])
    return result


def sides(tokens: int, vocabulary: int, width: int) -> tuple[Projection, Projection]:
    """A student that learns and a teacher, both drawn."""
    draw = torch.Generator().manual_seed(0)

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=draw) * scale

    student = tensor(tokens, width).requires_grad_(), tensor(vocabulary, width, scale=0.05).requires_grad_()
    return Projection(*student), Projection(tensor(tokens, width), tensor(vocabulary, width, scale=0.05))


def fused(
    student: Projection, target: Projection | Sampled, divergence: Divergence, labels: Tensor | None = None
) -> None:
    """Ours."""
    values, entropy = match(student, target, divergence, labels=labels)
    (values.sum() if entropy is None else values.sum() + entropy.sum()).backward()
    forget(student)


def products(student: Projection, teacher: Projection) -> None:
    """The four products alone."""
    with torch.no_grad():
        logits = student.hidden @ student.weight.T
        _ = teacher.hidden @ teacher.weight.T
        _ = logits @ student.weight
        _ = logits.T @ student.hidden


def dense(student: Projection, teacher: Projection) -> None:
    """What everybody writes first."""
    ours, theirs = student.dense().log_softmax(-1), teacher.dense().log_softmax(-1)
    F.kl_div(ours, theirs, reduction="sum", log_target=True).backward()
    forget(student)


def cross_entropy(student: Projection, labels: Tensor) -> None:
    """A step without a teacher."""
    F.cross_entropy(student.dense(), labels, reduction="sum").backward()
    forget(student)


def trl_jsd(student: Projection, teacher: Projection) -> None:
    """The generalised Jensen-Shannon divergence of TRL's GKD trainer."""
    from trl.experimental.gkd import GKDTrainer

    loss = GKDTrainer.generalized_jsd_loss(student.dense()[None], teacher.dense()[None], beta=0.5)
    loss.backward()
    forget(student)


def sampled(teacher: Projection, draws: int = 50) -> Sampled:
    """What a store keeps of the teacher: 50 draws of every row, not yet counted, so more entries than it would have."""
    ids = torch.cat([t.softmax(-1).multinomial(draws, replacement=True) for t in teacher.dense().split(256)])
    return Sampled(ids, torch.ones_like(ids, dtype=torch.uint8), teacher.shape[-1])


def forget(student: Projection) -> None:
    """Drop the gradients, so that every measurement forms its own."""
    student.hidden.grad = student.weight.grad = None


def timed(run: Callable[[], None]) -> Callable[[], float]:
    """A function's seconds."""

    def seconds() -> float:
        with no_garbage_collection():
            began = time.perf_counter()
            run()
            return time.perf_counter() - began

    return seconds


def _four(student: Projection, teacher: Projection) -> Callable[[], float]:
    return timed(lambda: products(student, teacher))


def _kl(student: Projection, teacher: Projection) -> Callable[[], float]:
    return timed(lambda: fused(student, teacher, Divergence()))


PROBE = """
import re, sys, torch
from benchmarks.divergence import sides
from transfuse.losses import Divergence, match

def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

tokens, vocabulary, width = map(int, sys.argv[1:])
match(*sides(64, 512, 64), Divergence())[0].sum().backward()  # libraries take their workspaces
student, teacher = sides(tokens, vocabulary, width)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
before = status("VmRSS")
match(student, teacher, Divergence())[0].sum().backward()
gradients = sum(t.grad.numel() * 4 for t in (student.hidden, student.weight)) / 2**20
print(status("VmHWM") - before - gradients)
"""


def peak(tokens: int, vocabulary: int, width: int) -> float:
    """Megabytes beyond inputs and gradients."""
    given = [sys.executable, "-c", PROBE, *map(str, (tokens, vocabulary, width))]
    return max(1.0, statistics.median(float(subprocess.check_output(given, text=True)) for _ in range(3)))

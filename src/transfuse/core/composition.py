"""How methods add up and follow each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.clock import Product, Schedule
from transfuse.core.errors import MethodError
from transfuse.core.method import Method, Weight
from transfuse.core.phases import Losses, Phase, Stage

if TYPE_CHECKING:
    from transfuse.core.run import Run


class Several(Method):
    """What a sum and a sequence of methods have in common: made of others, it does what they do."""

    def __init__(self, methods: Iterable[Method]):
        super().__init__()
        self.methods: Sequence[Method] = nn.ModuleList(methods)  # type: ignore[assignment]
        self.units = {k: v for m in self.methods for k, v in m.units.items()}
        self.keeps = tuple({k for m in self.methods for k in m.keeps})
        self.uses_source = any(m.uses_source for m in self.methods)
        self.needs_data = any(m.needs_data for m in self.methods)
        self.trains = any(m.trains for m in self.methods)
        self.moves_source = any(m.moves_source for m in self.methods)
        self.scored_by_stage = any(m.scored_by_stage for m in self.methods)
        self.brings_head = any(m.brings_head for m in self.methods)
        self.select = next((m.select for m in self.methods if m.select), None)
        self.one_process = next((m.one_process for m in self.methods if m.one_process), None)

    @property
    def parts(self) -> list[Method]:
        return [part for method in self.methods for part in method.parts]

    def wants(self) -> dict[str, list[str]]:
        return merged_wants(self.methods)

    def setup(self, run: Run, sample: Batch | None) -> None:
        for method in self.methods:
            method.setup(run, sample)

    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.methods[-1].correct(logits, labels)

    def begin_stage(self, i: int, run: Run) -> bool:
        begun = [method.begin_stage(i, run) for method in self.methods]  # every part, whatever the first says
        return all(begun)

    def begin_epoch(self, run: Run) -> None:
        for method in self.methods:
            method.begin_epoch(run)

    def end_stage(self, i: int, run: Run) -> None:
        for method in self.methods:
            method.end_stage(i, run)

    def deploy(self, target: nn.Module) -> nn.Module:
        for method in self.methods:
            target = method.deploy(target)
        return target


class Sum(Several):
    """Methods of one family that share its loss signature, added with weights. Made by `+` and `*`.

    Its gradient is exactly that of the weighted sum of the parts' losses; each part's `after_update` sees its
    own raw values. The models run once for all parts.
    """

    def __init__(self, parts: Sequence[tuple[Weight, Method]]):
        super().__init__(method for _, method in parts)
        self.weights = tuple(weight for weight, _ in parts)
        self._names: list[dict[str, str]] = [{} for _ in parts]

    def loss(self, *arguments: Any) -> Losses:
        """The parts' terms, weighted; the last argument of a family's loss is the clock."""
        clock, terms = arguments[-1], {}
        for i, (weight, method) in enumerate(zip(self.weights, self.methods, strict=True)):
            factor = weight(clock) if isinstance(weight, Schedule) else weight
            for name, term in method.loss(*arguments).items():  # type: ignore[operator]
                unique = self._names[i][name] = name if name not in terms else f"{name}.{i}"
                terms[unique] = factor * term
        return terms

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        for method, names in zip(self.methods, self._names, strict=True):
            method.after_update(phase, {own: values[name] for own, name in names.items() if name in values}, run)

    def __repr__(self) -> str:
        return " + ".join(
            f"{method!r}" if weight == 1.0 else f"{weight} * {method!r}"
            for weight, method in zip(self.weights, self.methods, strict=True)
        )


class Then(Several):
    """Methods in sequence: the first one's stages, then the second one's, ...

    A stage whose length is the caller's takes its method's share of it, so that a sequence costs no more
    updates than a single method would.

    Args:
        methods: in order.
        shares: parts of the caller's budget, adding up to 1; equal by default.
    """

    def __init__(self, *methods: Method, shares: Sequence[float] | None = None):
        super().__init__(methods)
        self.shares = tuple(shares or [1 / len(methods)] * len(methods))
        if len(self.shares) != len(methods) or abs(sum(self.shares) - 1) > 1e-6:
            raise MethodError(f"Then needs one share per method, adding up to 1; found {self.shares}")
        self.register_buffer("position", torch.tensor(0))
        self.register_buffer("first", torch.tensor(0))
        self.position: Tensor
        self.first: Tensor

    @property
    def current(self) -> Method:
        """The method whose turn it is."""
        return self.methods[int(self.position)]

    @property
    def taught_in_turns(self) -> bool:
        return int(self.position) + 1 < len(self.methods)

    def setup(self, run: Run, sample: Batch | None) -> None:
        self.position.zero_()
        self.first.zero_()
        super().setup(run, sample)

    def begin_stage(self, i: int, run: Run) -> bool:
        while not self.current.begin_stage(i - int(self.first), run):
            if int(self.position) + 1 == len(self.methods):
                return False
            self.position += 1
            self.first.fill_(i)
        return True

    def stage(self, i: int, run: Run) -> Stage:
        stage = self.current.stage(i - int(self.first), run)
        return replace(stage, share=stage.share * self.shares[int(self.position)])

    def learns(self, i: int) -> Iterator[nn.Parameter]:
        return self.current.learns(i - int(self.first))

    def begin_epoch(self, run: Run) -> None:
        self.current.begin_epoch(run)

    def end_stage(self, i: int, run: Run) -> None:
        self.current.end_stage(i - int(self.first), run)

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        self.current.after_update(phase, values, run)

    def __repr__(self) -> str:
        shares = "" if len(set(self.shares)) == 1 else f", shares={self.shares}"
        return f"Then({', '.join(map(repr, self.methods))}{shares})"


def merged_wants(methods: Iterable[Method]) -> dict[str, list[str]]:
    """The taps that any of the methods wants, by role, each once."""
    taps: dict[str, list[str]] = {}
    for method in methods:
        for role, names in method.wants().items():
            taps.setdefault(role, []).extend(n for n in names if n not in taps.get(role, []))
    return taps


def weighted_sum(parts: Sequence[tuple[Weight, Method]]) -> Method:
    """The sum of methods with weights; sums among them are unfolded.

    Raises:
        MethodError: two do not share a family's loss, or one has stages of its own.
    """
    flat: list[tuple[Weight, Method]] = []
    for weight, method in parts:
        inner = zip(method.weights, method.methods, strict=True) if isinstance(method, Sum) else [(1.0, method)]
        flat += [(_times(weight, w), m) for w, m in inner]
    base = _base(flat[0][1])
    if not hasattr(base, "loss"):
        raise MethodError(
            f"{type(flat[0][1]).__name__} has no loss to weigh or add to, as all of its family: use Then(...)"
        )
    for _, method in flat:
        if _base(method) is not base:
            raise MethodError(
                f"{type(flat[0][1]).__name__} and {type(method).__name__} do not share a loss and cannot be added: "
                f"run them in sequence with Then(...)"
            )
        for step in ("stage", "losses"):
            if getattr(type(method), step, None) is not getattr(base, step, None):
                raise MethodError(
                    f"{type(method).__name__} has stages of its own and cannot be weighed or added: "
                    "run it in sequence with Then(...)"
                )
    return type("Sum", (Sum, base), {})(flat)


def _base(method: Method) -> type[Method]:
    """The family's base class: the one that declares `family`."""
    for cls in type(method).__mro__:
        if cls.__dict__.get("family"):
            return cls
    raise MethodError(f"{type(method).__name__} belongs to no family whose methods add up; use Then(...)")


def _times(a: Weight, b: Weight) -> Weight:
    if isinstance(a, Schedule) or isinstance(b, Schedule):
        return b if a == 1.0 else a if b == 1.0 else Product(a, b)
    return a * b

"""What a method is, and how methods add up and follow each other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Product, Schedule
from transfuse.core.errors import MethodError
from transfuse.core.phases import Losses, Phase, Stage

if TYPE_CHECKING:
    from transfuse.core.run import Run

Weight = float | Schedule


class Method(nn.Module):
    """A way to move knowledge from a source into a target.

    What a method learns or remembers on the side is its parameters, buffers or a :class:`Bag`, so checkpoints,
    devices and precision come for free. Plain attributes must not change during training (a leading underscore
    marks scratch that lives within one update). A method never calls a model, `backward()` or an optimiser:
    it calls `run(role, batch)` and describes phases; the trainer does the rest.

    Arguments of `__init__` are kept as attributes of the same name: that is what its `repr`, the recipe and the
    checkpoint's check read.
    """

    card: ClassVar[Card] = Card(paper="not given")
    family: ClassVar[str] = ""
    units: Mapping[str, Callable[[Batch], float | Tensor]] = {}
    """Own counting units for terms: name -> count in one micro-batch of the first stream."""
    uses_source: bool = True
    """Whether the method runs a source at all."""
    keeps: Sequence[str] = ()
    """Roles that move without an optimiser (averaged or promoted models)."""

    def wants(self) -> dict[str, list[str]]:
        """Taps by role, see :mod:`transfuse.core.taps`."""
        return {}

    def setup(self, run: Run, sample: Batch | None) -> None:
        """Check the roles and build side modules from one real batch (None without data). Once per run."""

    def begin_stage(self, i: int, run: Run) -> bool:
        """May change state; exactly once per stage, also across resumes. False ends the run."""
        return i == 0

    def stage(self, i: int, run: Run) -> Stage:
        """Describe stage `i` from saved state, changing nothing: it is called again after a resume."""
        raise NotImplementedError

    def learns(self, i: int) -> Iterator[nn.Parameter]:
        """The parameters of the method itself that stage `i` must train; one in no phase is an error."""
        return self.parameters()

    def begin_epoch(self, run: Run) -> None:
        """Called once before each epoch of the first stream."""

    def end_stage(self, i: int, run: Run) -> None:
        """Called once when a stage has ended."""

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        """Called after each optimiser step with the raw value of every term over the whole update."""

    def deploy(self, target: nn.Module) -> nn.Module:
        """What the user gets back."""
        return target

    @property
    def continues(self) -> bool:
        """Whether other methods follow the stage at hand, and may teach what it leaves alone."""
        return False

    def weighted(self, weight: Weight) -> Method:
        """This method with its loss multiplied by a number or a schedule."""
        return _sum([(weight, self)])

    def __add__(self, other: Method) -> Method:
        return _sum([(1.0, self), (1.0, other)])

    def __rmul__(self, weight: Weight) -> Method:
        return self.weighted(weight)

    def __repr__(self) -> str:
        given = []
        for p in inspect.signature(type(self)).parameters.values():
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):  # no __init__ of its own, so nothing to show
                continue
            value = getattr(self, p.name, p.default)
            if p.default is inspect.Parameter.empty:
                given.append(repr(value))
            elif value != p.default:
                given.append(f"{p.name}={value!r}")
        return f"{type(self).__name__}({', '.join(given)})"


class Bag(nn.Module):
    """Named tensors whose shapes and number may change; on loading it becomes what was saved.

    Parameters are trained, other tensors are state: `bag["bank"] = tensor`, `bag["bank"]`, `"bank" in bag`.
    """

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._parameters.pop(name, None)
        self._buffers.pop(name, None)
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        else:
            self.register_buffer(name, value)

    def __getitem__(self, name: str) -> Tensor:
        for store in (self._parameters, self._buffers):
            if (value := store.get(name)) is not None:
                return value
        raise KeyError(name)

    def __contains__(self, name: str) -> bool:
        return name in self._parameters or name in self._buffers

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        names = [name for name, value in self._parameters.items() if value is not None]
        destination[prefix + "_learned"] = torch.tensor([ord(c) for c in "\n".join(names)], dtype=torch.int32)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        learned = "".join(map(chr, state_dict.pop(prefix + "_learned").tolist())).split("\n")
        device = next((t.device for t in (*self._parameters.values(), *self._buffers.values()) if t is not None), None)
        for name in (*self._parameters, *self._buffers):
            del self[name]
        for key in [k for k in state_dict if k.startswith(prefix) and "." not in k[len(prefix) :]]:
            name, value = key[len(prefix) :], state_dict[key].clone().to(device)
            self[name] = nn.Parameter(value) if name in learned else value
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __delitem__(self, name: str) -> None:
        self._parameters.pop(name, None)
        self._buffers.pop(name, None)


class Sum(Method):
    """Methods of one family that share its loss signature, added with weights. Made by `+` and `*`.

    Its gradient is exactly that of the weighted sum of the parts' losses; each part's `after_update` sees its
    own raw values. The models run once for all parts.
    """

    def __init__(self, parts: Sequence[tuple[Weight, Method]]):
        super().__init__()
        self.weights = tuple(weight for weight, _ in parts)
        self.methods: Sequence[Method] = nn.ModuleList(method for _, method in parts)  # type: ignore[assignment]
        self.units = {k: v for m in self.methods for k, v in m.units.items()}
        self.keeps = tuple({k for m in self.methods for k in m.keeps})
        self.uses_source = any(m.uses_source for m in self.methods)
        taught = [m for m in self.methods if m.uses_source]
        self.card = (taught or self.methods)[0].card  # type: ignore[misc]
        self._names: list[dict[str, str]] = [{} for _ in parts]

    def wants(self) -> dict[str, list[str]]:
        return _merged(self.methods)

    def setup(self, run: Run, sample: Batch | None) -> None:
        for method in self.methods:
            method.setup(run, sample)

    def loss(self, *arguments: Any) -> Losses:
        """The parts' terms, weighted; the last argument of a family's loss is the clock."""
        clock, terms = arguments[-1], {}
        for i, (weight, method) in enumerate(zip(self.weights, self.methods, strict=True)):
            factor = weight(clock) if isinstance(weight, Schedule) else weight
            for name, term in method.loss(*arguments).items():  # type: ignore[operator]
                unique = self._names[i][name] = name if name not in terms else f"{name}.{i}"
                terms[unique] = factor * term
        return terms

    def begin_stage(self, i: int, run: Run) -> bool:
        begun = [method.begin_stage(i, run) for method in self.methods]  # every part, whatever the first says
        return all(begun)

    def begin_epoch(self, run: Run) -> None:
        for method in self.methods:
            method.begin_epoch(run)

    def end_stage(self, i: int, run: Run) -> None:
        for method in self.methods:
            method.end_stage(i, run)

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        for method, names in zip(self.methods, self._names, strict=True):
            method.after_update(phase, {own: values[name] for own, name in names.items() if name in values}, run)

    def deploy(self, target: nn.Module) -> nn.Module:
        for method in self.methods:
            target = method.deploy(target)
        return target

    def __repr__(self) -> str:
        return " + ".join(
            f"{method!r}" if weight == 1.0 else f"{weight} * {method!r}"
            for weight, method in zip(self.weights, self.methods, strict=True)
        )


class Then(Method):
    """Methods in sequence: the first one's stages, then the second one's, ...

    A stage whose length is the caller's takes its method's share of it, so that a sequence costs no more
    updates than a single method would.

    Args:
        methods: in order.
        shares: parts of the caller's budget, adding up to 1; equal by default.
    """

    def __init__(self, *methods: Method, shares: Sequence[float] | None = None):
        super().__init__()
        self.shares = tuple(shares or [1 / len(methods)] * len(methods))
        if len(self.shares) != len(methods) or abs(sum(self.shares) - 1) > 1e-6:
            raise MethodError(f"Then needs one share per method, adding up to 1; found {self.shares}")
        self.methods: Sequence[Method] = nn.ModuleList(methods)  # type: ignore[assignment]
        self.units = {k: v for m in methods for k, v in m.units.items()}
        self.keeps = tuple({k for m in methods for k in m.keeps})
        self.uses_source = any(m.uses_source for m in methods)
        self.card = methods[-1].card  # type: ignore[misc]
        self.register_buffer("position", torch.tensor(0))
        self.register_buffer("first", torch.tensor(0))
        self.position: Tensor
        self.first: Tensor

    @property
    def current(self) -> Method:
        """The method whose turn it is."""
        return self.methods[int(self.position)]

    @property
    def continues(self) -> bool:
        return int(self.position) + 1 < len(self.methods)

    def wants(self) -> dict[str, list[str]]:
        return _merged(self.methods)

    def setup(self, run: Run, sample: Batch | None) -> None:
        self.position.zero_()
        self.first.zero_()
        for method in self.methods:
            method.setup(run, sample)

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

    def deploy(self, target: nn.Module) -> nn.Module:
        for method in self.methods:
            target = method.deploy(target)
        return target

    def __repr__(self) -> str:
        shares = "" if len(set(self.shares)) == 1 else f", shares={self.shares}"
        return f"Then({', '.join(map(repr, self.methods))}{shares})"


def _sum(parts: Sequence[tuple[Weight, Method]]) -> Method:
    flat: list[tuple[Weight, Method]] = []
    for weight, method in parts:
        inner = zip(method.weights, method.methods, strict=True) if isinstance(method, Sum) else [(1.0, method)]
        flat += [(_times(weight, w), m) for w, m in inner]
    base = _base(flat[0][1])
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


def _merged(methods: Sequence[Method]) -> dict[str, list[str]]:
    taps: dict[str, list[str]] = {}
    for method in methods:
        for role, names in method.wants().items():
            taps.setdefault(role, []).extend(n for n in names if n not in taps.get(role, []))
    return taps

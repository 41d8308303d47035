"""What a method is. How methods add up and follow each other: :mod:`transfuse.core.composition`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Schedule
from transfuse.core.phases import Phase, Stage

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
    needs_data: bool = True
    """Whether the caller must give data to train on; a data-free method makes its own."""
    trains: bool = True
    """Whether it trains anything; where no arm does, nobody has to say how long."""
    scores_source: bool = True
    """Whether a source answers the target's question; one of another task cannot be scored on its held-out data."""
    moves_source: bool = False
    """Whether sources are trained as well; every arm and seed then has copies of its own."""
    scored_by_stage: bool = False
    """Whether held-out data is scored after every stage: tasks of a stream, rounds of bought labels."""
    brings_head: bool = False
    """Whether predictions come from an output layer of the method's own, so that the target's may not fit labels."""
    select: str | None = None
    """How validation data is scored; None is the task's own metric. What needs no labels cannot leak them."""
    one_process: str | None = None
    """Why the method cannot run on several processes, where it cannot."""

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
        """What the user gets back. Called after every stage that is scored, so it must change nothing."""
        return target

    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Whether each held-out sample is answered correctly, `(samples,)`; what accuracy is the mean of."""
        return logits.argmax(-1) == labels

    def panels(self) -> list[dict[str, Any]]:
        """What the report shows of the method itself after training, see :class:`transfuse.report.schema.Panel`."""
        return []

    @property
    def parts(self) -> list[Method]:
        """The single methods that this one is made of."""
        return [self]

    @property
    def taught_in_turns(self) -> bool:
        """Whether what has no gradient now may have one later, from a method that follows or in a turn of its own."""
        return False

    def weighted(self, weight: Weight) -> Method:
        """This method with its loss multiplied by a number or a schedule."""
        return _composition().weighted_sum([(weight, self)])

    def __add__(self, other: Method) -> Method:
        return _composition().weighted_sum([(1.0, self), (1.0, other)])

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


def _composition() -> Any:
    from transfuse.core import composition  # it stands on this module

    return composition

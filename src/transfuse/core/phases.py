"""The parts a run is made of: a stage is a description, a phase says what moves on which loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from transfuse.core.batch import Batch
from transfuse.core.clock import Schedule
from transfuse.core.errors import MethodError
from transfuse.core.streams import Data, Stream
from transfuse.losses.reduction import Term

if TYPE_CHECKING:
    from transfuse.core.run import Run

Batches = Mapping[str, Batch]
Losses = dict[str, Term]
Gradients = dict[nn.Parameter, Tensor]
Groups = list[dict[str, Any]]


class Phase:
    """Which parameters move, on which loss, how often per step.

    Args:
        name: unique in its stage.
        loss: `loss(batches, run) -> {term name: Term}` for one micro-batch.
        params: parameters, or optimiser groups (dicts with `params` and their own `lr`, ...; `lr_scale` multiplies
            the learning rate that the caller asked for).
        optim: makes the optimiser from the groups; None takes the one the caller asked for.
        optimizer: name of the optimiser. Phases that move the same parameters and give it the same name share one,
            with its state: a network that is taught now by one phase, now by another. None takes the phase's name.
        times: repetitions per step, on the same batches; `run.rep` tells which.
        schedule: factor of every group's learning rate; None takes the caller's.
        edit: changes gradients in place, or returns new ones, between backward and clipping.
        combine: solves for the gradient of `shared` from the raw gradient rows of each term; `run.values` has the
            terms' values.
        shared: the parameters whose gradients `combine` decides; the others get the weighted sum.

    Raises:
        MethodError: there is nothing to train. (A pass without gradients is an :class:`Observe`.)
    """

    def __init__(
        self,
        name: str,
        loss: Callable[[Batches, Run], Losses],
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        optim: Callable[[Groups], Optimizer] | None = None,
        *,
        optimizer: str | None = None,
        times: int = 1,
        schedule: Schedule | None = None,
        edit: Callable[[Gradients, Run], Gradients | None] | None = None,
        combine: Callable[[dict[str, list[Tensor]], Run], Sequence[Tensor]] | None = None,
        shared: Iterable[nn.Parameter] = (),
    ):
        self.name, self.loss, self.optim, self.optimizer = name, loss, optim, optimizer or name
        self.times, self.schedule, self.edit, self.combine = times, schedule, edit, combine
        self.groups = _groups(params)
        self.params: list[nn.Parameter] = [p for group in self.groups for p in group["params"]]
        self.shared = list(shared)
        if not self.params:
            raise MethodError(
                f"phase {name!r} has no parameter that requires a gradient, so it would train nothing: "
                "thaw some parameters of the target, or use Observe for a pass without gradients"
            )
        if len(set(self.params)) < len(self.params):
            raise MethodError(f"phase {name!r} lists a parameter twice, so it would be updated twice a step")


@dataclass
class Observe:
    """A pass without gradients: prototypes, statistics, closed forms, client rounds.

    `fn(batches, run)` is called for every micro-batch of every step, under `no_grad`.
    """

    name: str
    fn: Callable[[Batches, Run], None]


@dataclass
class Stage:
    """A pure description of what one stage does. It is asked for again after a resume.

    Attributes:
        streams: data by the name losses know it by; the first defines the epoch.
        phases: done in this order in every step.
        epochs, steps: length; None for both means what the caller asked for.
        keep: `"last"`, or `"best"` to go back to the best validated state when the stage ends; with `"best or start"`
            that from before the stage counts, too.
        train: the roles that are in train mode; every other role is in eval mode.
        share: the part of the caller's budget this stage takes, where its length is the caller's.
    """

    streams: Mapping[str, Stream | Data]
    phases: Sequence[Phase | Observe]
    epochs: float | None = None
    steps: int | None = None
    keep: str = "last"
    train: Sequence[str] = ("target",)
    share: float = 1.0

    def __post_init__(self) -> None:
        if not self.streams:
            raise MethodError("a stage needs at least one stream; use Generated(length) where no data is read")
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise MethodError(f"the phases of a stage need different names, found {', '.join(names)}")
        shared: dict[str, Phase] = {}
        for phase in self.trained:
            first = shared.setdefault(phase.optimizer, phase)
            if set(first.params) != set(phase.params):
                raise MethodError(
                    f"the phases {first.name!r} and {phase.name!r} share the optimiser {phase.optimizer!r} but not "
                    "their parameters: give each an optimiser of its own, or both the same parameters"
                )

    @property
    def trained(self) -> list[Phase]:
        """The phases that move parameters."""
        return [p for p in self.phases if isinstance(p, Phase)]


def _groups(params: Iterable[Any]) -> Groups:
    # Materialised at once: an iterator looked at twice would be empty the second time, and train nothing.
    found = list(params)
    groups: Groups = found if found and isinstance(found[0], dict) else [{"params": found}]
    ready = [{**g, "params": [p for p in g["params"] if p.requires_grad]} for g in groups]
    return [g for g in ready if g["params"]]

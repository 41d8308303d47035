"""A client: how it learns in one round, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from transfuse.core.clock import Clock, Schedule
from transfuse.core.errors import InputError
from transfuse.core.method import Method
from transfuse.core.phases import Batches, Gradients, Groups, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Data, Indexed
from transfuse.federated.state import Payload
from transfuse.losses import IGNORE, Term, cross_entropy


@dataclass
class Reply:
    """What a client's part in a round leaves behind.

    Attributes:
        upload: what goes to the server.
        memory: what stays with the client until its next round.
        samples: how much data it has, the weight of what it sends.
        metrics: numbers about its training, which the server averages by `samples`.
        received: bytes of what the server had sent.
    """

    upload: Payload
    memory: Payload
    samples: int
    metrics: dict[str, float]
    received: int


class Client(Method):
    """How a client learns in one round: cross-entropy on its labels, mean over labelled samples or positions.

    Args:
        payload: what the server sent; memory: what the client kept from its last round.
        reset: start the optimiser anew; False goes on with the moments of the last round.

    Raises:
        InputError: the client's data has no labels.
    """

    uses_source = False

    def __init__(self, payload: Payload, memory: Payload, reset: bool = True):
        super().__init__()
        self.payload, self.memory, self.reset = payload, memory, reset
        self._optimizer: Optimizer
        self._losses: list[Tensor] = []

    def stage(self, i: int, run: Run) -> Stage:
        assert run.training is not None
        optim = partial(self._resumed, run.training.make_optimizer)
        phase = Phase("client", self.losses, run["target"].parameters(), optim, edit=self.edit)
        return Stage({"data": run.data["data"]}, [phase])

    def losses(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        if batch.labels is None:
            raise InputError("federated methods learn from labels, the data of this client has none")
        values = cross_entropy(run("target", batch).logits, batch.labels)
        return {"labels": Term.of(values, batch.labels != IGNORE, "labelled")}

    def edit(self, grads: Gradients, run: Run) -> Gradients | None:
        """Change the gradients of an update before the optimiser uses them."""
        return None

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        if "labels" in values:
            self._losses.append(values["labels"])

    def sends(self) -> Payload:
        """What goes to the server besides the model."""
        return {}

    def metrics(self) -> dict[str, float]:
        """Numbers for the server to average: `loss` is the mean over the round's updates."""
        return {"loss": float(torch.stack(self._losses).mean())} if self._losses else {}

    def remembers(self) -> Payload:
        """What the client keeps for its next round: its optimiser's moments, unless they are reset."""
        if self.reset:
            return {}
        state = self._optimizer.state_dict()["state"]
        kept = {f"moment_{i}_{k}": v for i, found in state.items() for k, v in found.items() if isinstance(v, Tensor)}
        return {name: value.detach().cpu().clone() for name, value in kept.items()}

    def _resumed(self, make: Callable[[Groups], Optimizer], groups: Groups) -> Optimizer:
        self._optimizer = make(groups)
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in self.memory.items():
            if key.startswith("moment_"):
                _, number, name = key.split("_", 2)
                state.setdefault(int(number), {})[name] = value.clone()
        if state:
            self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
        return self._optimizer


@dataclass(frozen=True)
class AcrossRounds(Schedule):
    """A schedule that goes on from round to round, instead of starting anew with each client."""

    schedule: Schedule
    round: int
    rounds: int

    def __call__(self, clock: Clock) -> float:
        step, steps = self.round * clock.steps + clock.step, self.rounds * clock.steps
        return self.schedule(Clock(clock.stage, step, steps, clock.per_epoch))


def samples_of(data: Data, who: str) -> int:
    """How many samples a client has.

    Raises:
        InputError: none, or its data does not say how many.
    """
    if not isinstance(data, Indexed):
        raise InputError(
            f"{who} gives its data in batches of its own, so the number of its samples, which is its weight, is not "
            "known: pass a data set or tensors"
        )
    if data.size == 0:
        raise InputError(f"{who} has no samples: leave it out")
    return data.size

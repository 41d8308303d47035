"""Networks that learn at once, each from its labels and from what the others say about the same samples.

A method of this kind is one function, `loss(role, networks, batch, clock)`: the terms of one network. What it
reads from `networks` is the graph of who teaches whom. Methods with a frozen teacher: :mod:`transfuse.distill.base`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError, TransferError
from transfuse.core.method import Method
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.teacher import same_classes
from transfuse.losses import Term


class Online(Method):
    """Base of methods that train every network: the sources in their order, and `"target"`, which is the last.

    Each network runs forward once per batch and has its own group in the optimiser. It sees the others without their
    graphs, so no loss reaches another network's parameters, and one step on the sum of all losses is the same as
    a step of every network on its own. `"data"` is the only stream, and it has labels.
    """

    family = "distill"
    moves_source = True

    def loss(self, role: str, networks: Mapping[str, Outputs], batch: Batch, clock: Clock) -> Losses:
        """The terms of one network on one micro-batch.

        Args:
            role: whose loss it is.
            networks: the outputs of all, in order: its own with their graph, the others' as they are shown to it.
        """
        raise NotImplementedError

    def losses(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        own = {role: self.own(role, batch, run) for role in self.group(run)}
        shown = {role: run.shown(role, outputs) for role, outputs in own.items()}
        terms: dict[str, Term] = {}
        for role, outputs in own.items():
            found = self.loss(role, {**shown, role: outputs}, batch, run.clock)
            terms |= {f"{role}/{name}": term for name, term in found.items()}
        return terms

    def setup(self, run: Run, sample: Batch | None) -> None:
        name = type(self).__name__
        if sample is None or sample.labels is None:
            raise InputError(f"{name} needs labelled data, since no network knows anything yet: pass data=...")
        if len(self.group(run)) < 2:
            raise InputError(f"{name} trains several networks at once: pass the others as source=...")
        self._require_apart(run)
        found = {role: self.own(role, sample, run, grad=False) for role in self.group(run)}
        for outputs in found.values():
            same_classes(found["target"].logits, outputs.logits)
        try:
            for role in found:
                self.loss(role, found, sample, run.clock)
        except TransferError:
            raise
        except ValueError as error:
            raise InputError(f"{name} cannot use this batch: {error}") from error

    def stage(self, i: int, run: Run) -> Stage:
        groups = [*self.groups(run, self.group(run)), {"params": list(self.parameters())}]
        return Stage({"data": self.data(run)}, [Phase("online", self.losses, groups)], train=self.group(run))

    def group(self, run: Run) -> list[str]:
        """Every role, from the first source to the target."""
        return [*run.sources, "target"]

    def groups(self, run: Run, roles: list[str]) -> list[dict[str, Any]]:
        """One optimiser group for each of these roles."""
        return [{"params": list(run[role].parameters())} for role in roles]

    def data(self, run: Run) -> Any:
        """The only stream.

        Raises:
            InputError: the caller gave other ones.
        """
        if "data" not in run.data:
            raise InputError(f"{type(self).__name__} reads one data set, found {', '.join(run.data) or 'none'}")
        return run.data["data"]

    def own(self, role: str, batch: Batch, run: Run, grad: bool = True) -> Outputs:
        """A network's outputs for a loss of its own.

        Raises:
            InputError: a batch of one sample, whose statistics say nothing, for a network with batch normalisation.
        """
        if batch.size == 1 and run[role].training and any(isinstance(m, _BatchNorm) for m in run[role].modules()):
            raise InputError(
                f"{role!r} has batch normalisation, which cannot learn from a batch of one sample: "
                "use a larger batch_size or micro_batch, or another normalisation"
            )
        return run(role, batch, grad=grad, own=True)

    def _require_apart(self, run: Run) -> None:
        """Every network can learn, and shares nothing with another."""
        owners: dict[nn.Parameter, str] = {}
        for role in self.group(run):
            parameters = [p for p in run[role].parameters() if p.requires_grad]
            if not parameters:
                raise InputError(
                    f"every network of {type(self).__name__} learns, but {role!r} has no parameter that requires a "
                    "gradient: thaw it, or use KD for a teacher that stays as it is"
                )
            if other := next((owners[p] for p in parameters if p in owners), None):
                raise InputError(f"{other!r} and {role!r} share parameters: pass copies, each is trained on its own")
            owners |= dict.fromkeys(parameters, role)

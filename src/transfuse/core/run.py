"""The object a method works with: it runs models, knows the time, and keeps what must not move from moving."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transfuse.core import rng
from transfuse.core.batch import Batch
from transfuse.core.clock import Clock
from transfuse.core.decoding import generate
from transfuse.core.errors import InputError, MethodError, nearest
from transfuse.core.output_layer import find_output_layer, left_out
from transfuse.core.outputs import Features, Outputs, call, full_precision
from transfuse.core.phases import Phase
from transfuse.core.probe import no_trace
from transfuse.core.streams import Data
from transfuse.core.sync import Sync
from transfuse.core.taps import Stopped, Swap, Taps
from transfuse.core.teacher import Recorded
from transfuse.core.training import Training
from transfuse.core.watch import Watch

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Run:
    """One run of a method: `run(role, batch)` is the only way a method calls a model.

    Attributes:
        clock: where the stage stands.
        phase: the phase at work, or None between steps.
        rep: which repetition of the phase, from 0.
        values: the raw value of every term over the whole update, for `edit` and `combine`.
        data: the caller's data by name.
        task: `"classification"`, `"language-model"`, ...
        training: what the caller asked for, for what a method trains inside a step of its own (clients, probes).
        device, rank, world: where this process runs.
        watch: what the user is told unasked; a method adds its findings with `run.watch.say(finding, message)`.
    """

    def __init__(
        self,
        roles: Mapping[str, nn.Module],
        data: Mapping[str, Data],
        *,
        sync: Sync | None = None,
        precision: str = "fp32",
        task: str = "classification",
        seed: int = 0,
        shuffled: bool = False,
        training: Training | None = None,
    ):
        if precision not in PRECISIONS:
            raise InputError(f"unknown precision {precision!r}: {nearest(precision, PRECISIONS)}")
        self.roles, self.data, self.sync = dict(roles), data, sync or Sync()
        self.device, self.rank, self.world = self.sync.device, self.sync.rank, self.sync.world
        self.precision, self.task, self.seed, self.shuffled = PRECISIONS[precision], task, seed, shuffled
        self.clock, self.rep, self.training, self.watch = Clock(), 0, training, Watch()
        self.notes: dict[str, tuple[float, float]] = {}
        self.optimizers: dict[str, Optimizer] = {}
        self.phase: Phase | None = None
        self.values: dict[str, Tensor] = {}
        self._taps: dict[str, Taps] = {}
        self._wants: dict[str, list[str]] = {}
        self._learning: set[str] = set()
        self._train: set[str] = set()
        self._shared = self._shares_modules()
        self._layers: dict[str, nn.Linear | None] = {}
        self._learners: dict[Phase, set[str]] = {}

    def __getitem__(self, role: str) -> nn.Module:
        if role not in self.roles:
            raise InputError(f"this run has no {role!r}: {nearest(role, self.roles)}")
        return self.roles[role]

    def __contains__(self, role: str) -> bool:
        return role in self.roles

    @property
    def sources(self) -> list[str]:
        """The names of the source roles."""
        return [role for role in self.roles if role == "source" or role.startswith("source.")]

    def __call__(
        self,
        role: str,
        batch: Batch,
        grad: bool = True,
        params: Mapping[str, Tensor] | None = None,
        swap: Swap | None = None,
        until: str | None = None,
        own: bool = False,
    ) -> Outputs:
        """Run a model on a batch, with autocast, taps, and buffers that move only while the model learns.

        Args:
            role: `"target"`, `"source"`, `"source.0"`, ...
            batch: the model is called with its `inputs`, and told its `task` if its `forward` asks for that.
            grad: False runs without a graph, and moves no running statistics.
            params: parameters and buffers to use in the place of the model's own, by name.
            swap: activations to put in the place of tapped ones.
            until: stop after this tap; the outputs then have no logits.
            own: a source runs for a loss of its own, not to teach: the control arm leaves its outputs in order.
        """
        model = self[role]
        if isinstance(model, Recorded):
            outputs = model.read(batch)
            return self._shuffle(outputs) if self.shuffled and role in self.sources and not own else outputs
        if role not in self._taps:
            self._taps[role] = Taps(model, self._wants.get(role, ()), batch.inputs)
        if self._shared:
            self.set_modes(self._train, only=role)
        if model.training and not (grad and role in self._learning):
            # Running statistics belong to a model that learns; here it works on copies of them.
            params = {**{name: buffer.clone() for name, buffer in model.named_buffers()}, **(params or {})}
        taps = self._taps[role]
        autocast = torch.autocast(self.device.type, self.precision) if self.precision else nullcontext()
        opened = taps.open(swap, until) if taps.paths or swap or until else nullcontext(Features())
        layer = self._output_layer(role, batch)
        with nullcontext() if grad else torch.no_grad(), autocast, opened as features, left_out(layer) as projections:
            try:
                raw = call(model, batch.inputs, params, batch.task)
            except Stopped:
                raw = None
        if projections:
            raw = projections[-1]
        outputs = Outputs(raw, Features({name: _full_precision(value) for name, value in features.items()}))
        return self._shuffle(outputs) if self.shuffled and role in self.sources and not own else outputs

    def generate(self, role: str | Sequence[str], tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        """Let a language model continue prompts, without a graph and in eval mode, from the run's random numbers.

        Args:
            role: or several, which write together, with `fuse`.
            tokens, mask: prompts `(batch, n)`, padded on the left, and where they are real.
            options: of :func:`transfuse.core.decoding.generate`.
        """
        with torch.autocast(self.device.type, self.precision) if self.precision else nullcontext():
            models = self[role] if isinstance(role, str) else [self[name] for name in role]
            return generate(models, tokens, mask=mask, **options)

    def shown(self, role: str, outputs: Outputs) -> Outputs:
        """What a network that learns shows to others: its outputs without a graph; in the control arm a source's
        are those of other samples."""
        shown = Outputs(outputs.logits, outputs.features).on_samples(Tensor.detach)
        return self._shuffle(shown) if self.shuffled and role in self.sources else shown

    def install(self, wants: Mapping[str, list[str]]) -> None:
        """Declare the taps of every role; each is put in place when the role sees its first batch."""
        for role in wants:
            self[role]
        self._wants = dict(wants)

    def tap(self, role: str, names: Iterable[str]) -> None:
        """Declare more taps of a role, in `setup`, for a method that learns their names from the model."""
        self[role]
        wanted = self._wants.get(role, [])
        self._wants[role] = [*wanted, *(name for name in names if name not in wanted)]
        if role in self._taps:
            self._taps.pop(role).remove()

    def add(self, role: str, model: nn.Module) -> None:
        """Make a model of the method's own a role, in `setup`, so that it is run, trained and kept like any other."""
        self.roles[role] = model
        self._shared = self._shares_modules()

    def remove_taps(self) -> None:
        """Leave every model as it was found."""
        for taps in self._taps.values():
            taps.remove()
        self._taps = {}

    def set_modes(self, train: set[str], only: str | None = None) -> None:
        """Put the roles in `train` into train mode and every other into eval mode."""
        self._train = train
        for role in (only,) if only else sorted(self.roles, key=lambda r: r in train):
            self.roles[role].train(role in train)

    @contextmanager
    def during(self, phase: Phase, rep: int) -> Iterator[None]:
        """The phase at work: its roles learn, all others keep their buffers."""
        self.phase, self.rep = phase, rep
        self._learning = self.roles_of(phase)
        try:
            yield
        finally:
            self.phase, self._learning = None, set()

    @contextmanager
    def probe(self) -> Iterator[None]:
        """Work on the models and leave no trace: see :func:`transfuse.core.probe.no_trace`."""
        seed = rng.derive(self.seed, "probe", self.clock.stage, self.clock.step)
        with no_trace(*self.roles.values(), seed=seed):
            yield

    def note(self, name: str, value: float, weight: float = 0.0) -> None:
        """Put a number of a pass without gradients into the learning curve; it adds to the loss by its weight."""
        self.notes[name] = value, weight

    def shared_rng(self, *purpose: object) -> torch.Generator:
        """Random numbers that are the same in every process, for choices of structure (what to reset, whom to pick)."""
        return torch.Generator().manual_seed(rng.derive(self.seed, self.clock.stage, self.clock.step, *purpose))

    def reset_optim(self, phase: str) -> None:
        """Let a phase's optimiser forget its momenta: they belong to parameters that have just been drawn anew."""
        if phase not in self.optimizers:
            raise MethodError(f"this stage has no phase {phase!r} to reset: {nearest(phase, self.optimizers)}")
        self.optimizers[phase].state.clear()

    def clone(self, role: str) -> nn.Module:
        """A copy of a role without its taps."""
        if role in self._taps:
            self._taps.pop(role).remove()
        return copy.deepcopy(self[role])

    def roles_of(self, phase: Phase) -> set[str]:
        """The roles of which a phase moves at least one parameter."""
        # Remembered, because every update asks and looking through the parameters of a large model takes a while.
        if phase not in self._learners:
            moved = set(phase.params)
            self._learners[phase] = {r for r, m in self.roles.items() if any(p in moved for p in m.parameters())}
        return self._learners[phase]

    def _output_layer(self, role: str, batch: Batch) -> nn.Linear | None:
        """The layer that losses apply to a language model's hidden states; None where the model applies it."""
        if self.task != "language-model" or batch.inputs is None:
            return None
        if role not in self._layers:
            self._layers[role] = find_output_layer(self[role], batch.inputs)
        return self._layers[role]

    def _shares_modules(self) -> bool:
        seen: set[int] = set()
        for model in self.roles.values():
            own = {id(m) for m in model.modules()}
            if seen & own:
                return True
            seen |= own
        return False

    def _shuffle(self, outputs: Outputs) -> Outputs:
        """Give every sample the outputs of another one: the control arm that has a teacher but no knowledge."""
        size = (next(iter(outputs.features.values())) if outputs.raw is None else outputs.scores).shape[0]
        if size < 2:
            raise InputError("a shuffled teacher needs at least two samples in every micro-batch")
        cycle = torch.randperm(size, device=self.device)
        order = torch.empty_like(cycle)
        order[cycle] = cycle.roll(1)
        return outputs.on_samples(lambda value: value[order] if value.dim() and value.shape[0] == size else value)


def _full_precision(feature: Any) -> Any:
    if isinstance(feature, list):
        return [_full_precision(f) for f in feature]
    return full_precision(feature)

"""The loop: stages, steps, phases, micro-batches. Methods describe, this runs.

Killed at any point and resumed, a run ends bit-identical on the same machine: everything that moves is in the
checkpoint, the order of the data is a pure function of a position, and random numbers belong to the run.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from transfuse.core import checks, rng
from transfuse.core.batch import Batch, line_up
from transfuse.core.checkpoint import Checkpoints
from transfuse.core.clock import Clock
from transfuse.core.curve import RECORDS, Curve
from transfuse.core.errors import DivergenceError, InputError, MethodError, StoreError, TransferError
from transfuse.core.interruption import Interrupted, Interruption
from transfuse.core.method import Method
from transfuse.core.phases import Losses, Observe, Phase, Stage
from transfuse.core.placement import held, move
from transfuse.core.run import Run
from transfuse.core.streams import Cursor, Data, Draw, Stream
from transfuse.core.sync import Sync
from transfuse.core.training import Training
from transfuse.core.update import Update, count_units
from transfuse.core.watch import FIRST

READS = 10
"""On an accelerator, values are read (and checked) every so many updates: reading makes it wait."""


class Trainer:
    """Runs one method once.

    Args:
        method: what to do.
        roles: the models by role: `"target"`, `"source"`, ...; all but what the method moves stay bit-identical.
        data: data by name, as the method's stages call it.
        training: how long and how.
        folder: where checkpoints go; None writes none.
        validate: scores what the method would deploy, for curves and `keep="best"`.
        higher_is_better: which way the score points.
        sync: how processes agree; pass `Sync()` for a trainer inside another.
        task: `"classification"`, `"language-model"`, `"token-classification"`, `"segmentation"`.
        shuffled: give every sample the source's outputs for another one (the control arm).
        listener: called after each update with this trainer and, when one was made, a record of the curve.
        score_stage: called after each stage with what the method would deploy; its scores are kept in `stages`.

    Raises:
        MethodError: the method cannot run on several processes.
    """

    def __init__(
        self,
        method: Method,
        roles: Mapping[str, nn.Module],
        data: Mapping[str, Data],
        training: Training,
        *,
        folder: Path | None = None,
        validate: Callable[[nn.Module], float] | None = None,
        higher_is_better: bool = True,
        sync: Sync | None = None,
        task: str = "classification",
        shuffled: bool = False,
        listener: Callable[[Trainer, dict[str, Any] | None], None] | None = None,
        score_stage: Callable[[nn.Module], dict[str, float]] | None = None,
    ):
        self.method, self.training, self.validate, self.listener = method, training, validate, listener
        self.higher_is_better, self.score_stage = higher_is_better, score_stage
        self.sync = sync or Sync()
        if self.sync.world > 1 and method.one_process:
            raise MethodError(
                f"{type(method).__name__} cannot run on {self.sync.world} processes: {method.one_process}. "
                "Start it without a launcher"
            )
        self.run = Run(
            roles,
            data,
            sync=self.sync,
            precision=training.precision,
            task=task,
            seed=training.seed,
            shuffled=shuffled,
            training=training,
        )
        self.checkpoints = Checkpoints(folder) if folder else None
        self.scaler = torch.amp.GradScaler(self.run.device.type, enabled=training.precision == "fp16")
        self.schedule = training.make_schedule()
        self.curve, self.watch = Curve(), self.run.watch
        self.updates = 0
        """Updates done over all stages."""
        self.stages: list[dict[str, float]] = []
        """Scores after each stage, where `score_stage` was given."""
        self.average: AveragedModel | None = None
        self._number, self._opened, self._used = 0, False, False
        self._stage: Stage
        self._optimizers: dict[str, Optimizer] = {}
        self._cursors: dict[str, Cursor] = {}
        self._best: dict[str, Any] | None = None
        self._pending: dict[str, Any] | None = None
        self._moving: set[str] = set()
        self._empty = 0
        # Gradient norms need the graph twice, which compiled models do not keep.
        self._compiled = any(_is_compiled(m) for model in roles.values() for m in model.modules())
        self._interruption = Interruption()
        self._saved_at = time.monotonic()

    @property
    def clock(self) -> Clock:
        """Where the current stage stands."""
        return self.run.clock

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of each optimiser's first group at its last update."""
        return {name: optimizer.param_groups[0]["lr"] for name, optimizer in self._optimizers.items()}

    @property
    def history(self) -> list[dict[str, Any]]:
        """The learning curve, see :class:`~transfuse.core.curve.Curve`."""
        return self.curve.records

    @property
    def target(self) -> nn.Module:
        """The target, or its moving average where one is kept."""
        return self.average.module if self.average else self.run["target"]

    def fit(self, resume: bool = False) -> nn.Module:
        """Run every stage and return what the method deploys.

        Args:
            resume: go on from the newest checkpoint in the folder, if there is one.

        Raises:
            InputError: called a second time; unusable data; a checkpoint of another method or training.
            DivergenceError: a term is not finite; the last good checkpoint is kept.
            Interrupted: the user stopped the run.
        """
        if self._used:
            raise InputError("this trainer has run already, and its method and target have moved: make a new one")
        self._used = True
        seed = rng.derive(self.training.seed, "run", self.sync.rank)
        with rng.scope(seed), torch.enable_grad(), self._interruption:
            try:
                self._start(resume)
                while self._enter_stage():
                    self._run_stage()
                    self._leave_stage()
            finally:
                self.run.remove_taps()
                for optimizer in self._optimizers.values():
                    optimizer.zero_grad()
        if self.average:
            self.run["target"].load_state_dict(self.average.module.state_dict())
        return self.method.deploy(self.run["target"])

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs to give back what `fit` has returned."""
        return {"target": self.run["target"].state_dict(), "method": self.method.state_dict()}

    def restore(self, state: dict[str, Any]) -> nn.Module:
        """What a finished run of this trainer returned, from its :meth:`state`, without training again.

        Raises:
            StoreError: the state is that of other models.
        """
        with rng.scope(self.training.seed):
            self._start(False)
            self.run.remove_taps()
        try:
            self.run["target"].load_state_dict(state["target"])
            self.method.load_state_dict(state["method"])
        except RuntimeError as error:
            raise StoreError(f"what was saved does not fit these models: {error}") from None
        return self.method.deploy(self.run["target"])

    # Stages ----------------------------------------------------------------------------------------------------

    def _start(self, resume: bool) -> None:
        for model in self.run.roles.values():
            move(model, self.run.device)
            self.sync.broadcast(t.data for t in held(model))
        self._frozen = checks.Frozen(self.run.roles)
        if self.training.ema is not None:
            self.average = AveragedModel(self.run["target"], multi_avg_fn=get_ema_multi_avg_fn(self.training.ema))
        first = next(iter(self.run.data.values()), None)
        sample = first.sample(self.training.batch_size) if first else None
        self.run.install(self.method.wants())
        self.run.set_modes(set())
        with self.run.probe():
            self.method.setup(self.run, sample and line_up(sample, self.run.task).to(self.run.device))
        self.method.to(self.run.device)
        self._agree()
        if resume and self.checkpoints and (saved := self.checkpoints.load(self.sync)):
            self._load(*saved)

    def _enter_stage(self) -> bool:
        """Open the next stage, or the one a checkpoint stands in; False when there is none."""
        resumed, self._pending = self._pending, None
        if resumed is None:
            self.run.clock = Clock(self._number)
        if not self._opened:
            if not self.method.begin_stage(self._number, self.run):
                return False
            self._agree()
            self._opened = True
        self._stage = stage = self.method.stage(self._number, self.run)
        self._names = checks.parameter_names(self.method, self.run.roles)
        checks.require_phases(self.method, self._number, stage, self._names)
        self._moving |= set(self.method.keeps) | {r for p in stage.trained for r in self.run.roles_of(p)}
        self.run.set_modes(set(stage.train))
        self._cursors = {name: self._cursor(name, s) for name, s in stage.streams.items()}
        self._optimizers = {}
        for phase in stage.trained:
            if phase.optimizer not in self._optimizers:
                self._optimizers[phase.optimizer] = (phase.optim or self.training.make_optimizer)(phase.groups)
        self.run.optimizers = self._optimizers
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
        self._set_length(stage)
        if resumed is None:
            self.watch.enter_stage()
            self._save()
        else:
            self._load_stage(resumed)
        return True

    def _run_stage(self) -> None:
        clock = self.clock
        if clock.step == 0 and self._stage.keep == "best or start" and self.validate:
            self._score()
        while clock.step < clock.steps:
            if clock.step % (clock.per_epoch or clock.steps) == 0:
                self.method.begin_epoch(self.run)
            micro = self._draw()
            counts = count_units(self.method, micro)
            if self.run.device.type != "cpu":
                micro = [{name: batch.to(self.run.device) for name, batch in batches.items()} for batches in micro]
            for phase in self._stage.phases:
                if isinstance(phase, Observe):
                    with torch.no_grad():
                        for batches in micro:
                            phase.fn(batches, self.run)
                    notes, self.run.notes = self.run.notes, {}
                    self.curve.note({n: v for n, (v, _) in notes.items()}, {n: w for n, (_, w) in notes.items()}, {})
                else:
                    for rep in range(phase.times):
                        with self.run.during(phase, rep):
                            self._update(phase, micro, counts)
            clock.step += 1
            self.updates += 1
            if self.average:
                self.average.update_parameters(self.run["target"])
            record = self._record()
            if self.listener:
                self.listener(self, record)
            self._maybe_save()

    def _leave_stage(self) -> None:
        self._agree_buffers()  # so that what a method finds out from the models is the same in every process
        self.method.end_stage(self._number, self.run)
        self._agree()
        self._agree_buffers()
        if self._best:
            self.target.load_state_dict(self._best["state"])
            with torch.no_grad():
                for name, p in self.method.named_parameters():
                    p.copy_(self._best["learned"][name])
        self._best = None
        self._frozen.check(self._moving)
        if self.score_stage:
            with self.run.probe(), torch.no_grad():
                self.stages.append(self.score_stage(self.method.deploy(self.target)))
        self._number, self._opened = self._number + 1, False
        self.run.clock = Clock(self._number)
        self._save()

    # One update ------------------------------------------------------------------------------------------------

    def _update(self, phase: Phase, micro: list[dict[str, Batch]], local: dict[str, float]) -> None:
        """Many micro-batches, one step of the phase's optimiser."""
        optimizer, step = self._optimizers[phase.optimizer], self.clock.step
        optimizer.zero_grad()
        update = Update(phase, local, self._totals(local), self.sync, self.scaler)
        norms: dict[str, float] | None = None
        for batches in micro:
            terms = self._loss(phase, batches)
            update.note(terms)
            if norms is None and self.watch.due(step) and not self._compiled:
                norms = self.watch.norms(phase, terms, update.totals)
            update.backward(terms)
        update.finish()
        values = update.values()
        self._require_something(phase, values)
        if self.run.device.type == "cpu" or step % READS == 0 or step + 1 == self.clock.steps:
            self._read(phase, update, values, norms, micro)
        self.scaler.unscale_(optimizer)
        self.run.values = values
        if phase.combine:
            for p, gradient in zip(phase.shared, phase.combine(update.rows(), self.run), strict=True):
                p.grad = gradient
        if phase.edit:
            given = {p: p.grad for p in phase.params if p.grad is not None}
            for p, gradient in (phase.edit(given, self.run) or given).items():
                p.grad = gradient
        if step < FIRST and not self.method.taught_in_turns:
            self.watch.untaught(phase, self._names, update.terms, step)
        if self.training.clip:
            # Networks that learn side by side have losses of their own: one must not shorten the other's gradient.
            together = len(self.run.roles_of(phase)) < 2
            for params in [phase.params] if together else [group["params"] for group in phase.groups]:
                torch.nn.utils.clip_grad_norm_(params, self.training.clip)
        factor = (phase.schedule or self.schedule)(self.clock)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor * group.get("lr_scale", 1.0)
        if any(p.grad is not None for p in phase.params):  # a phase may find nobody to teach in an update
            self.scaler.step(optimizer)
            self.scaler.update()
        self.method.after_update(phase, values, self.run)

    def _require_something(self, phase: Phase, values: dict[str, Tensor]) -> None:
        """An epoch in which no term of a phase counted anything has taught nothing."""
        self._empty = 0 if values else self._empty + 1
        if self._empty == (self.clock.per_epoch or self.clock.steps):
            raise InputError(
                f"phase {phase.name!r}: nothing in {self._empty} updates counted, so nothing was learned. Is every "
                "label -100, or every position masked? A chat template that marks no answer does that"
            )

    def _loss(self, phase: Phase, batches: Mapping[str, Batch]) -> Losses:
        try:
            return phase.loss(batches, self.run)
        except TransferError:
            raise
        except ValueError as error:  # the losses' own: shapes, or a label out of range in a later batch
            raise InputError(f"phase {phase.name!r}, update {self.updates}: {error}") from error

    def _read(
        self,
        phase: Phase,
        update: Update,
        values: dict[str, Tensor],
        norms: dict[str, float] | None,
        micro: list[dict[str, Batch]],
    ) -> None:
        """Check the values of an update, and note them for the learning curve."""
        update.check_counts()
        numbers = {name: float(value) for name, value in values.items()}
        if broken := [name for name, number in numbers.items() if not math.isfinite(number)]:
            self._diverged(phase, broken, micro)
        weights = {name: term.weight for name, term in update.terms.items()}
        self.watch.values(phase, numbers, weights)
        if norms is not None:
            self.watch.shares(phase, norms, weights, self.clock.step)
        prefix = "" if len(self._stage.trained) == 1 else phase.name + "/"
        self.curve.note(*({prefix + name: v for name, v in d.items()} for d in (numbers, weights, norms or {})))

    def _diverged(self, phase: Phase, broken: list[str], micro: list[dict[str, Batch]]) -> None:
        what = f"{', '.join(map(repr, broken))} {'is' if len(broken) == 1 else 'are'} not finite"
        where = f"at update {self.clock.step} of stage {self._number}, phase {phase.name!r}"
        kept = self.checkpoints.newest if self.checkpoints else None
        after = f" The last good checkpoint is kept in {kept}." if kept else ""
        if found := checks.not_finite(micro):
            raise DivergenceError(
                f"the data holds values that are not finite: {found}; so {what} {where}. Clean the data.{after}"
            )
        rate = self._optimizers[phase.optimizer].param_groups[0]["lr"]
        raise DivergenceError(
            f"the loss {what} {where}. Lower the learning rate (now {rate:.2g}), or clip gradients with clip=1.0."
            + after
        )

    def _totals(self, local: dict[str, float]) -> dict[str, float]:
        """What each unit holds over all processes."""
        if self.sync.world == 1:
            return local
        total = self.sync.sum(torch.tensor(list(local.values()), dtype=torch.float64))
        return dict(zip(local, total.tolist(), strict=True))

    # Data ------------------------------------------------------------------------------------------------------

    def _cursor(self, name: str, stream: Stream | Data) -> Cursor:
        stream = stream if isinstance(stream, Stream) else Stream(stream, shuffle=self.training.shuffle)
        draw = Draw(
            batch_size=stream.batch_size or self.training.batch_size,
            micro_batch=self.training.micro_batch,
            shuffle=stream.shuffle,
            seed=rng.derive(self.training.seed, "data", self._number),
            rank=self.sync.rank,
            world=self.sync.world,
            workers=self.training.workers,
        )
        return Cursor(stream.data, draw, name)

    def _draw(self) -> list[dict[str, Batch]]:
        """The micro-batches of the next update, one batch per stream in each, still on the CPU."""
        drawn = {name: cursor.next() for name, cursor in self._cursors.items()}
        pieces = len(next(iter(drawn.values())))
        for name, batches in drawn.items():
            if len(batches) != pieces:
                raise InputError(
                    f"stream {name!r} gives {len(batches)} micro-batches where the first stream gives {pieces}: "
                    "choose batch sizes that are the same number of micro-batches"
                )
        return [{name: line_up(batches[i], self.run.task) for name, batches in drawn.items()} for i in range(pieces)]

    def _set_length(self, stage: Stage) -> None:
        first = next(iter(self._cursors.values()))
        per_epoch = first.data.updates(first.draw.batch_size)
        own = stage.epochs or stage.steps
        epochs, steps = (stage.epochs, stage.steps) if own else (self.training.epochs, self.training.steps)
        if steps is None:
            if per_epoch is None:
                raise InputError("this data has no length, so epochs mean nothing: say steps=...")
            steps = round((epochs or 0) * per_epoch)
        self.clock.steps, self.clock.per_epoch = max(1, round(steps * (1 if own else stage.share))), per_epoch

    # Recording and keeping -------------------------------------------------------------------------------------

    def _record(self) -> dict[str, Any] | None:
        """A point of the learning curve, when one is due."""
        clock = self.clock
        last = clock.step == clock.steps
        every = self.training.validate_every or clock.per_epoch or clock.steps
        score = self._score() if self.validate and (last or clock.step % every == 0) else None
        if score is None and not last and clock.step % max(1, clock.steps // RECORDS):
            return None
        return self.curve.record(self.updates, clock.step / clock.per_epoch if clock.per_epoch else 0.0, score)

    def _score(self) -> float:
        """Validate the target, and remember it where the stage keeps the best."""
        assert self.validate is not None
        self._agree_buffers()
        with rng.scope(0), torch.no_grad():
            score = float(self.validate(self.method.deploy(self.target)))
        self.run.set_modes(set(self._stage.train))
        if self._stage.keep != "last" and (self._best is None or self._improves(score, self._best["score"])):
            state = {k: v.detach().cpu().clone() for k, v in self.target.state_dict().items()}
            learned = {k: p.detach().cpu().clone() for k, p in self.method.named_parameters()}
            self._best = {"score": score, "state": state, "learned": learned}
        return score

    def _improves(self, score: float, best: float) -> bool:
        return score > best if self.higher_is_better else score < best

    def _maybe_save(self) -> None:
        """Save when it is time, and stop when the user asked for it; all processes decide alike."""
        due, stop = time.monotonic() - self._saved_at >= self.training.checkpoint_every, self._interruption.asked
        if self.sync.world > 1:
            flags = self.sync.sum(torch.tensor([float(due and self.sync.rank == 0), float(stop)]))
            due, stop = bool(flags[0]), bool(flags[1])
        if due or stop:
            self._save()
        if stop:
            if self.checkpoints is None:
                raise Interrupted(f"stopped after update {self.updates}; no folder was given, so nothing was saved")
            raise Interrupted(
                f"stopped after update {self.updates}; the checkpoint is {self.checkpoints.newest}. "
                "Go on with `transfuse resume`, or fit(resume=True)"
            )

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        moving = {role: self.run[role] for role in sorted(self._moving)}
        kept = self.checkpoints.newest
        checks.require_finite(
            (self.method, *moving.values()),
            f"at update {self.updates}, so nothing was saved over the last good checkpoint {kept}.",
        )
        shared = {
            "fingerprint": self._fingerprint(),
            "number": self._number,
            "opened": self._opened,
            "updates": self.updates,
            "stages": self.stages,
            "step": self.clock.step,
            "curve": self.curve.state_dict(),
            "watch": self.watch.state_dict(),
            "moving": {role: model.state_dict() for role, model in moving.items()},
            "method": self.method.state_dict(),
            "optimizers": {name: o.state_dict() for name, o in self._optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "best": self._best,
            "cursors": {name: c.state_dict() for name, c in self._cursors.items()},
        }
        self.checkpoints.save(self.updates, shared, {"rng": rng.state()}, self.sync)
        self._saved_at = time.monotonic()

    def _load(self, shared: dict[str, Any], own: dict[str, Any]) -> None:
        """Take over what belongs to the run; what belongs to the stage waits until it is described."""
        before = shared["fingerprint"]
        if differences := [
            f"{k} was {before.get(k)}, is now {v}" for k, v in self._fingerprint().items() if before.get(k) != v
        ]:
            newest = self.checkpoints and self.checkpoints.newest
            raise InputError(f"the checkpoint in {newest} belongs to another run: {'; '.join(differences)}")
        try:
            for role, state in shared["moving"].items():
                self.run[role].load_state_dict(state)
            self.method.load_state_dict(shared["method"])
        except RuntimeError as error:
            raise StoreError(f"the checkpoint does not fit these models: {error}") from None
        if self.average:
            self.average.load_state_dict(shared["average"])
        self.method.to(self.run.device)
        self.curve.load_state_dict(shared["curve"])
        self.watch.load_state_dict(shared["watch"])
        self._moving, self._best, self.updates = set(shared["moving"]), shared["best"], shared["updates"]
        self._number, self._opened, self.stages = shared["number"], shared["opened"], list(shared["stages"])
        if self._opened:
            self.run.clock = Clock(self._number, shared["step"])
            self._pending = {**shared, **own}
        else:
            self.run.clock = Clock(self._number)
            rng.restore(own["rng"])

    def _load_stage(self, saved: dict[str, Any]) -> None:
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
        self.scaler.load_state_dict(saved["scaler"])
        for name, cursor in self._cursors.items():
            cursor.load_state_dict(saved["cursors"][name])
        # Last of all: describing the stage may have drawn random numbers.
        rng.restore(saved["rng"])

    def _fingerprint(self) -> dict[str, str]:
        """What must be the same for a checkpoint to go on."""
        skip = {"workers", "checkpoint_every"}
        given = {
            "method": repr(self.method),
            "target": type(self.run["target"]).__name__,
            "task": self.run.task,
            "shuffled": str(self.run.shuffled),
            **{f.name: str(getattr(self.training, f.name)) for f in fields(self.training) if f.name not in skip},
        }
        # Functions and objects without a repr of their own show an address, another one in every process.
        return {key: re.sub(r" at 0x[0-9a-f]+", "", value) for key, value in given.items()}

    # Agreement of processes ------------------------------------------------------------------------------------

    def _agree(self) -> None:
        """Give every process the method's state of the first: structure may have been drawn at random."""
        self.sync.broadcast(t.data for t in (*self.method.parameters(), *self.method.buffers()))

    def _agree_buffers(self) -> None:
        """Give every process the running statistics of the first."""
        for role in sorted(self._moving):
            self.sync.broadcast(self.run[role].buffers())


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None

"""How far a run is: all its trainings, and the one at work."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

from rich import progress as rich_progress
from rich.console import Console

if TYPE_CHECKING:
    from transfuse.core.trainer import Trainer

PAUSE = 0.2
"""Seconds between two looks, so that showing a run does not slow it down."""


class Counting:
    """Lines on stderr for one long task before the trainings: how far it is, and how long it will take.

    Called with how many are done, and of how many; speaks at most every `pause` seconds.
    """

    def __init__(self, what: str, pause: float = 15.0):
        self.what, self.pause = what, pause
        self._began = self._spoke = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._spoke < self.pause and done < total:
            return
        self._spoke = now
        left = (now - self._began) / done * (total - done)
        Console(stderr=True).print(f"{self.what}: {done} of {total}, {left:.0f} s left", highlight=False)


class Progress:
    """Two bars on a terminal, and a line for every finished training. Called after every update.

    Args:
        total: trainings of the whole run.
        finished: how many of them an earlier run has done.
        shown: False shows nothing.
        console: where to; by default stderr.
    """

    def __init__(self, total: int, finished: int = 0, shown: bool = True, console: Console | None = None):
        console = console or Console(stderr=True)
        self._bars = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(bar_width=20),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[numbers]}", markup=False),
            rich_progress.TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
            transient=True,
            refresh_per_second=4,
        )
        self._shown = shown
        self._finished = finished
        self._all = self._bars.add_task("trainings", total=total, completed=finished, numbers="")
        self._one = self._bars.add_task("", total=None, numbers="", visible=False)
        self._current: tuple[str, int] | None = None
        self._began = self._looked = 0.0
        self._score: float | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self._end_training()
        self._bars.stop()

    def __call__(self, arm: str, seed: int, trainer: Trainer, record: dict[str, Any] | None) -> None:
        now = time.monotonic()
        if (arm, seed) != self._current:
            self._end_training()
            self._current, self._began, self._score = (arm, seed), now, None
        if record and record["validate"] is not None:
            self._score = record["validate"]
        clock = trainer.clock
        if now - self._looked < PAUSE and clock.step < clock.steps:
            return
        self._looked = now
        numbers = f"loss {trainer.history[-1]['loss']:.4g}" if trainer.history else ""
        self._bars.update(
            self._one,
            description=f"{arm}, seed {seed}",
            total=clock.steps,
            completed=clock.step,
            numbers=numbers + self._validation(),
            visible=True,
        )
        self._bars.update(self._all, completed=self._finished + clock.fraction)

    def _end_training(self) -> None:
        if self._current is None:
            return
        self._finished += 1
        if self._shown:
            arm, seed = self._current
            seconds = time.monotonic() - self._began
            text = f"{arm}, seed {seed}: done in {seconds:.1f} s{self._validation()}"
            self._bars.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
        self._bars.update(self._all, completed=self._finished)

    def _validation(self) -> str:
        return "" if self._score is None else f", validation {self._score:.4f}"

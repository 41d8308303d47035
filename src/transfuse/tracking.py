"""Learning curves sent to experiment trackers, through Accelerate's interface to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from transfuse.core import rng
from transfuse.core.errors import InputError, MissingExtraError, nearest
from transfuse.core.files import file_name

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from transfuse.core.trainer import Trainer

PROJECTS = {
    "clearml": "task_name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "trackio": "name",
    "wandb": "name",
}
"""Trackers that group runs by project, and what they call the name of one run; others know one name only."""


class Tracking:
    """Sends every record of a learning curve to trackers, one run per arm and seed. Called after every update.

    Args:
        names: of trackers as Accelerate knows them: `"tensorboard"`, `"wandb"`, `"mlflow"`, ...
        project: what the runs belong to.
        folder: where trackers that write files put them.

    Raises:
        InputError: there is no such tracker, its package is not installed, or it needs a folder.
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, names: Sequence[str], project: str, folder: Path | None):
        self._names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        self._project, self._folder = file_name(project) or "transfer", folder
        self._current: tuple[str, int] | None = None
        self._open: list[GeneralTracker] = []
        for name in self._names:
            self._require(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._finish()

    def __call__(self, arm: str, seed: int, trainer: Trainer, record: dict[str, Any] | None) -> None:
        if record is None:
            return
        with rng.scope():  # a tracker may draw the name of its run
            if (arm, seed) != self._current:
                self._finish()
                self._current, run = (arm, seed), f"{file_name(arm)}/seed-{seed}"
                for name in self._names:
                    self._open.append(self._start(name, run, record["step"]))
            for tracker in self._open:
                tracker.log(scalars(trainer, record), step=record["step"])

    def _require(self, name: str) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
        from accelerate.utils import LoggerType

        if name not in LOGGER_TYPE_TO_CLASS:
            raise InputError(f"no tracker is called {name!r}: {nearest(name, LOGGER_TYPE_TO_CLASS)}")
        # A tracker that the user registered is in neither list.
        if name in set(LoggerType.list()) - set(map(str, get_available_trackers())):
            if name == "tensorboard":
                raise MissingExtraError(name, "track", "track")
            raise InputError(f"track: {name!r} needs the package {name}, which is not installed: pip install {name}")
        if self._folder is None and (LOGGER_TYPE_TO_CLASS[name].requires_logging_directory or name == "dvclive"):
            raise InputError(f"track: {name!r} writes files and needs a folder: pass out=...")

    def _start(self, name: str, run: str, step: int) -> GeneralTracker:
        """Open a run; `step` is its first, or the first after an interruption."""
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # some trackers log before they would set it up
        make = LOGGER_TYPE_TO_CLASS[name]
        if name in PROJECTS:
            tracker = make(self._project, **{PROJECTS[name]: run})
        elif name == "tensorboard":
            # Points that an interrupted run wrote after its last checkpoint come again.
            tracker = make(run, str(self._folder), purge_step=step)
        elif name == "dvclive":
            tracker = make(dir=f"{self._folder}/{run}", resume=True)
        else:
            tracker = make(f"{self._project}/{run}", *([str(self._folder)] if make.requires_logging_directory else []))
        if hasattr(tracker, "start"):  # older versions of Accelerate start in __init__
            tracker.start()
        return tracker

    def _finish(self) -> None:
        while self._open:
            self._open.pop().finish()


def scalars(trainer: Trainer, record: dict[str, Any]) -> dict[str, float]:
    """A record under flat names, without what was not measured."""
    values = {"loss": record["loss"], "validate": record["validate"]}
    for name, term in record["terms"].items():
        values.update({f"terms/{name}/{what}": value for what, value in term.items()})
    values.update({f"lr/{phase}": rate for phase, rate in trainer.rates.items()})
    return {name: value for name, value in values.items() if value is not None}

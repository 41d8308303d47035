"""One call: train a method and its baselines under the same budget and seeds, and say whether knowledge arrived."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

from transfuse.comparison import ArmResult, ArmRun, Facts, compare
from transfuse.core import rng
from transfuse.core.batch import Batch
from transfuse.core.card import TASKS
from transfuse.core.catalogue import ARMS, working_with
from transfuse.core.checkpoint import load_state, load_weights, save_state, save_weights
from transfuse.core.checks import fingerprint
from transfuse.core.errors import InputError, ShapeError, StoreError, nearest
from transfuse.core.files import file_name, make_folder, write_atomically
from transfuse.core.method import Method
from transfuse.core.outputs import modes_kept
from transfuse.core.placement import move
from transfuse.core.streams import Adapt, Data, Indexed, Iterated
from transfuse.core.sync import sync_for
from transfuse.core.teacher import Recorded, gives, require
from transfuse.core.trainer import Trainer
from transfuse.core.training import Training
from transfuse.distill import Labels
from transfuse.embedding import domain_panels
from transfuse.evaluation import HIGHER_IS_BETTER, Evaluation, evaluate, main_metric
from transfuse.given import HeldOut, read, read_held_out, read_sources, read_streams
from transfuse.inspection import Inspection
from transfuse.inspection import inspect as inspect_models
from transfuse.losses import IGNORE
from transfuse.measure import VALIDATORS, Measure, correct
from transfuse.probing import first_logits, footprint, has_labels, infer_task, reinitialised, require_fit
from transfuse.tracking import Tracking

if TYPE_CHECKING:
    from transfuse.report.schema import Report

Target = nn.Module | Callable[[], nn.Module]
Listener = Callable[[str, int, Trainer, dict[str, Any] | None], None]
"""Called after each update with the arm's name, the seed, the trainer, and a record of the curve when one was made."""


ORACLE = "oracle"
"""The validator that is none: it asks the labels of the domain that is to have none."""


@dataclass(frozen=True)
class Arm:
    """One way to train the target: the method, a baseline, or a control."""

    name: str
    role: str
    method: Method
    shuffled: bool = False
    fresh: bool = False
    labelled_only: bool = False

    @property
    def folder(self) -> str:
        """A name for the file system."""
        return file_name(self.name)


@dataclass(frozen=True)
class Result:
    """What a transfer gives back.

    Attributes:
        model: the trained target of the first seed, of exactly the class that was passed in, in eval mode.
        report: whether the knowledge arrived.
        arms: what every arm did with every seed, sample by sample, for questions that the report does not answer.
    """

    model: nn.Module
    report: Report
    arms: Sequence[ArmResult]

    def save(self, folder: str | Path) -> Path:
        """Write `model.safetensors`, `report.json`, `report.html` and `recipe.json`; return the folder.

        Raises:
            StoreError: the folder cannot be written to.
        """
        from transfuse.report import write_html

        folder = Path(folder)
        make_folder(folder)
        save_weights(folder / "model.safetensors", self.model)
        self.report.write(folder / "report.json")
        write_html(self.report, folder / "report.html")
        write_atomically(folder / "recipe.json", json.dumps(self.report.recipe, indent=2))
        return folder


@overload
def transfer(
    method: Method, source: Any = None, target: Target | None = None, data: Any = None, **options: Any
) -> Result: ...


@overload
def transfer(
    method: Measure, source: Any = None, target: Any = None, data: Any = None, **options: Any
) -> Inspection: ...


def transfer(
    method: Method | Measure,
    source: Any = None,
    target: Any = None,
    data: Any = None,
    **options: Any,
) -> Result | Inspection:
    """Move knowledge from a source into a target over data, by a method, and report whether it arrived.

    Args:
        method: what to do, for instance `KD(temperature=4) + 0.5 * Hints("layer2", "layer3")`.
        source: what knows: a model, any function from inputs to logits, or a list or dict of several; for methods
            that learn from another domain, its labelled data. It stays bit-identical.
        target: the student: a model, or a function that builds one (then every seed has its own initial weights).
            Yours is not changed; the trained copy is `result.model`.
        data: what is trained on: a data set, tensors, a DataLoader, a list of batches or a function that returns
            an iterator; `(inputs, labels)`, mappings and unlabelled tensors all work. Or several: a dict by name,
            or a list of data sets in order (tasks, clients). None for methods that need no data.
        options: as for :class:`Transfer`: `validate`, `test`, `compare`, `seeds`, `out`, ..., and everything
            that :class:`~transfuse.core.training.Training` takes: `epochs`, `batch_size`, `lr`, ...

    A measure may stand in the place of the method. Then nothing is trained, the options are those of
    :func:`transfuse.inspection.inspect`, and what comes back has a `measurement`.

    Raises:
        TransferError: with what was expected, what was found and what to do, before training where possible.
    """
    if isinstance(method, Measure):
        return inspect_models(method, source, target, data, **options)
    return Transfer(method, source, target, data, **options).run()


class Transfer:
    """A transfer that can be checked before it is run, and resumed after it was interrupted.

    Args:
        method, source, target, data: as for :func:`transfer`.
        validate: held-out data for learning curves and for choosing; also for the report where `test` is not given.
        test: held-out data for the report. It may be several sets, as a dict or a list: tasks, clients, domains.
        compare: arms to train under the same budget and seeds: `"scratch"` (the target with new initial weights,
            labels only), `"finetune"` (the target as given, labels only), `"shuffled teacher"` (the method, every
            sample taught with another sample's outputs), `"shuffled source"` (the method, every source sample with
            another sample's label), or methods.
        seeds: each arm is trained once per seed.
        select: how validation data is scored, for learning curves and where the best state is kept: the name of a
            validator that needs no labels (:data:`transfuse.measure.VALIDATORS`), or `"oracle"`, the task's own
            metric. By default what the method says; what adapts to unlabelled data never sees its labels.
        task: `"classification"`, `"language-model"`, `"token-classification"` or `"segmentation"`; found out from
            one batch by default.
        classes: names of the classes, for the report.
        adapt: function from what the data yields to `(inputs, labels)`, a mapping or a batch.
        collate: function from a list of samples to a batch; by default samples are stacked, or padded.
        out: folder for checkpoints, results and the report; None keeps everything in memory.
        device: where to run; by default the first accelerator, else the CPU.
        name: of the transfer, for the report.
        recipe: what to show as the recipe; by default the arguments.
        store: what the source said about the training data, see :class:`~transfuse.core.store.TeacherStore`. Arms that
            first of all learn from what it kept (RSKD from draws) read it, and the source does not run for them.
        listener: called after every update, see :data:`Listener`.
        progress: whether to show progress bars; by default where stderr is a terminal and there is no listener.
        track: experiment trackers that learning curves go to, as Accelerate calls them: `"tensorboard"`, `"wandb"`,
            `"mlflow"`, ...; one run per arm and seed. Those that write files write to `tracking` in `out`.
        training: everything :class:`~transfuse.core.training.Training` takes: `epochs` or `steps`, ...
    """

    def __init__(
        self,
        method: Method,
        source: Any = None,
        target: Target | None = None,
        data: Any = None,
        *,
        validate: Any = None,
        test: Any = None,
        compare: Sequence[str | Method] = (),
        seeds: Sequence[int] = (0,),
        select: str | None = None,
        task: str | None = None,
        classes: Sequence[str] | None = None,
        adapt: Adapt | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        out: str | Path | None = None,
        device: str | torch.device | None = None,
        name: str = "transfer",
        recipe: Mapping[str, Any] | None = None,
        store: Recorded | None = None,
        listener: Listener | None = None,
        progress: bool | None = None,
        track: Sequence[str] = (),
        **training: Any,
    ):
        if not isinstance(method, Method):
            raise InputError(f"method is a {type(method).__name__}: expected a method, for instance KD()")
        if target is None:
            raise InputError("a transfer needs a target: pass target=model, or a function that builds one")
        if not isinstance(seeds, Sequence) or not seeds or not all(isinstance(s, int) for s in seeds):
            raise InputError(f"seeds are {seeds!r}: expected a list of whole numbers")
        if len(set(seeds)) < len(seeds):
            raise InputError(f"seeds are {list(seeds)}: give at least one, each once")
        if isinstance(compare, str | Method):
            raise InputError(f"compare is {compare!r}: expected a list, for instance ['scratch']")
        if task is not None and task not in TASKS:
            raise InputError(f"unknown task {task!r}: {nearest(task, TASKS)}")
        self.method, self.target = method, target
        self.data = read_streams(data, adapt, collate)
        self.sources: dict[str, nn.Module] = {}
        if _from_data(method):
            if source is None:
                raise InputError(f"{method!r} learns from labelled data of another domain: pass it as source=...")
            self.data["source"] = read("source", None, source, adapt, collate)
        else:
            self.sources = read_sources(source)
        if any(model is target for model in self.sources.values()):
            raise InputError("source and target are the same object: pass copy.deepcopy(source) as the target")
        self.validate = read_held_out("validate", validate, adapt, collate)
        self.test = self.validate if test is None else read_held_out("test", test, adapt, collate)
        known = {f for f in Training.__dataclass_fields__ if f != "seed"}
        own = {p.name for p in inspect.signature(Transfer).parameters.values() if p.kind is p.KEYWORD_ONLY}
        for option in training:
            if option not in known:
                raise InputError(f"transfer has no option {option!r}: {nearest(option, known | own)}")
        self.seeds, self.classes, self.name = tuple(seeds), classes, name
        self.out = None if out is None else Path(out)
        self.sync = sync_for(device)
        self._listeners: tuple[Listener, ...] = () if listener is None else (listener,)
        self.arms = [Arm(repr(method), "method", method), *(self._arm(entry) for entry in compare)]
        for arm in self.arms:
            self._require_given(arm)
        timed = any(arm.method.trains for arm in self.arms) or not training.keys().isdisjoint({"epochs", "steps"})
        self.training = Training(**training if timed else {"steps": 1, **training})
        if len({arm.folder for arm in self.arms}) < len(self.arms):
            raise InputError(f"two arms have the same name: {', '.join(arm.name for arm in self.arms)}")
        once = [name for name, found in self.data.items() if isinstance(found, Iterated) and found.once]
        if once and len(self.arms) * len(self.seeds) > 1:
            raise InputError(
                f"{once[0]} is an iterator, which can be read only once, for {len(self.arms)} arms and "
                f"{len(self.seeds)} seed(s): pass a function that returns a new one, a list, or a DataLoader"
            )
        if len(self.arms) > 1 and self.test is None:
            raise InputError("a comparison needs held-out data: pass validate=... or test=...")
        self.recipe, self.store = recipe or self._describe(training), store
        self._task = task
        self.select = method.select if select is None else select
        if self.select not in (None, ORACLE, *VALIDATORS):
            raise InputError(f"unknown validator {self.select!r}: {nearest(str(self.select), (ORACLE, *VALIDATORS))}")
        self._progress = progress
        self._tracking = Tracking(track, name, self.out and self.out / "tracking") if track else None
        self._used, self._classes, self._apart = False, 0, False

    def check(self) -> dict[str, Any]:
        """A dry run: everything that can go wrong before training does so here, and the rest is estimated.

        One real batch goes through both models and a few updates run on copies; nothing is written.

        Returns:
            What was found: data, models with their taps and shapes, capabilities, memory, time.
        """
        from transfuse.check import check

        return check(self)

    def run(self, resume: bool = False) -> Result:
        """Train every arm with every seed, measure, judge, and write the results where `out` says.

        Args:
            resume: go on in `out`: finished arms are read, an interrupted one goes on from its checkpoint.

        Raises:
            TransferError: as :func:`transfer`.
            Interrupted: the user stopped it; `transfuse resume` or `run(resume=True)` goes on.
        """
        if self._used:
            raise InputError("this transfer has run already: make a new one, or call run(resume=True) on a new one")
        self._used = True
        self._claim_folder(resume)
        with modes_kept(*self.sources.values()):
            sample = self.first_pass()
            self._check_data()
            reference = self._measure_source()
            with self._watched():
                results, model = self._train_arms(resume, reference)
            report = compare(results, self._facts(sample, reference, model))
        result = Result(model.eval(), report, results)
        if self.out and self.sync.rank == 0:
            result.save(self.out)
        self.sync.barrier()
        return result

    # Before training -------------------------------------------------------------------------------------------

    @property
    def task(self) -> str:
        """What the logits are about."""
        if self._task is None:
            self.first_pass()
        assert self._task is not None
        return self._task

    @cached_property
    def metric(self) -> str:
        """What the comparison is about."""
        held_out = None if self.test is None else self.test.sample(8)
        return main_metric(self.task, held_out is None or has_labels(held_out))

    def first_pass(self) -> Batch:
        """Run one real batch through source and target, find out the task, and return the batch.

        Raises:
            ShapeError: a model cannot run on the data; the message has the shapes and the model's own words.
            CapabilityError: the source cannot give what a method needs.
        """
        streams = [*self.data.values(), *(data for data in (self.test, self.validate) if data is not None)]
        sample = streams[0].sample(min(self.training.batch_size, 8)) if streams else None
        if sample is None:
            raise InputError("there is nothing to read: pass data, or held-out data as test=... or validate=...")
        target = self.build_target(self.seeds[0])
        for role, model in self.sources.items():
            if not isinstance(model, Recorded):
                first_logits(role, move(model, self.sync.device), sample.for_source().to(self.sync.device))
        self._apart = sample.for_source() is not sample
        logits = first_logits("target", target.to(self.sync.device), sample.to(self.sync.device))
        self._task, self._classes = self._task or infer_task(sample, logits), logits.shape[1]
        for what, data in (("validate", self.validate), ("test", self.test)):
            held_out = None if data is None else data.sample(8)
            if held_out is not None and not self.method.brings_head:
                require_fit(what, target, held_out.to(self.sync.device), self._task)
        for arm in self.arms:
            if self.source is not None and arm.method.uses_source:
                _require(arm.method, next(iter(self._sources_of(arm.method).values())))
        if (
            self.classes is not None
            and self.task == "classification"
            and not self.method.brings_head
            and logits.shape[1] != len(self.classes)
        ):
            raise ShapeError(f"the target has {logits.shape[1]} classes, {len(self.classes)} class names were given")
        return sample

    def build_target(self, seed: int, fresh: bool = False) -> nn.Module:
        """The target as an arm starts with it.

        Args:
            seed: of the initial weights, where the target is a function or is redrawn.
            fresh: redraw the weights of a target given as a model.
        """
        with rng.scope(rng.derive(seed, "target")):
            if not isinstance(self.target, nn.Module):
                built = self.target()
                if not isinstance(built, nn.Module):
                    raise InputError(f"the function given as target returned a {type(built).__name__}, not a model")
                return built
            model = copy.deepcopy(self.target)
            return reinitialised(model) if fresh else model

    @property
    def source(self) -> nn.Module | None:
        """The first source model."""
        return next(iter(self.sources.values()), None)

    def _sources_of(self, method: Method) -> dict[str, nn.Module]:
        """What teaches an arm: the store, where every part of its method wants what was kept, else the sources."""
        if self.store is not None and all(part.card.teacher in gives(self.store) for part in method.parts):
            return {"source": self.store}
        return self.sources

    @property
    def _measured_against(self) -> nn.Module | None:
        """What agreement and held-out divergence are measured against: a source that can be asked anything, about the
        same positions."""
        unasked = isinstance(self.source, Recorded) or self._apart or not self.method.scores_source
        return None if unasked else self.source

    def _arm(self, entry: str | Method) -> Arm:
        if isinstance(entry, Method):
            return Arm(repr(entry), "baseline" if _is_control(entry) else "method (compared)", entry)
        if not isinstance(entry, str):
            raise InputError(f"compare holds {entry!r}: expected names of arms, or methods")
        name = entry.replace("_", " ").replace("-", " ").lower()
        if name in ("shuffled teacher", "shuffled"):
            if not self.sources or not self.method.uses_source:
                raise InputError(f"{self.method!r} has no teacher to shuffle")
            return Arm("shuffled teacher", "control", self.method, shuffled=True)
        if name == "shuffled source":
            if not _from_data(self.method):
                raise InputError(f"{self.method!r} has no source data whose labels could be shuffled")
            return Arm(name, "control", self.method, shuffled=True)
        if name in ("scratch", "finetune"):
            return Arm(name, "baseline", Labels(), fresh=name == "scratch", labelled_only=True)
        raise InputError(f"no arm is called {entry!r}: {nearest(entry, ARMS)} A method can be given as well")

    def _require_given(self, arm: Arm) -> None:
        """Every arm has the source and the data that it needs."""
        method = arm.method
        if _from_data(method):
            if "source" not in self.data:
                raise InputError(f"{method!r} learns from labelled source data, which {self.method!r} has none of")
        elif method.uses_source and not self.sources:
            raise InputError(f"{method!r} needs a source: pass source=teacher")
        if method.needs_data and not self.data.keys() - {"source"}:
            raise InputError(
                "a transfer needs data: pass data=..."
                if arm.role == "method"
                else f"the arm {arm.name!r} needs data to learn from, and this transfer has none: leave it out"
            )

    def _all_data(self) -> dict[str, Data | None]:
        return {**self.data, "validate": self.validate, "test": self.test}

    def _check_data(self) -> None:
        """Labels that do not fit, or that teach nothing, where reading them costs nothing."""
        for name, data in self._all_data().items():
            labels = data.tensors.get("labels") if isinstance(data, Indexed) and data.tensors else None
            if labels is None or self.task != "classification" or self.method.brings_head:
                continue
            assert isinstance(data, Indexed)
            found = (labels if data.root is None else labels[data.root]).unique()
            found = found[found != IGNORE]
            if len(found) == 1 and len(self.data) == 1:
                raise InputError(f"every label of {name!r} is {int(found[0])}: one class alone cannot be learned")
            if len(found) and (found[0] < 0 or found[-1] >= self._classes):
                raise InputError(
                    f"labels of {name!r} go from {int(found[0])} to {int(found[-1])}, the target has {self._classes} "
                    f"classes: expected 0 to {self._classes - 1}, or {IGNORE} for unlabelled samples"
                )

    # Training --------------------------------------------------------------------------------------------------

    def _train_arms(self, resume: bool, reference: Evaluation | None) -> tuple[list[ArmResult], nn.Module]:
        results, model = [], None
        for arm in self.arms:
            result = ArmResult(arm.name, arm.role)
            for seed in self.seeds:
                trained, run = self._train(arm, seed, resume, reference, needed=model is None)
                result.runs.append(run)
                model = trained if model is None else model
            results.append(result)
        assert model is not None
        return results, model

    def _watched(self) -> ExitStack:
        """Progress bars, by default where nobody else listens, and trackers; in the first process alone."""
        stack = ExitStack()
        if self.sync.rank:
            return stack
        if sys.stderr.isatty() and not self._listeners if self._progress is None else self._progress:
            from transfuse.progress import Progress

            bars = Progress(len(self.arms) * len(self.seeds))
            self._listeners += (stack.enter_context(bars),)
        if self._tracking:
            self._listeners += (stack.enter_context(self._tracking),)
        return stack

    def _tell(self, arm: str, seed: int, trainer: Trainer, record: dict[str, Any] | None) -> None:
        for listener in self._listeners:
            listener(arm, seed, trainer, record)

    def _train(
        self, arm: Arm, seed: int, resume: bool, reference: Evaluation | None, needed: bool
    ) -> tuple[nn.Module | None, ArmRun]:
        """One arm with one seed, trained, or read where it was finished before; the model only where it is needed."""
        folder = self.out / "arms" / arm.folder / f"seed-{seed}" if self.out else None
        if resume and folder and (folder / "run.safetensors").exists():
            try:
                state = load_state(folder / "run.safetensors")
                model = self._finished(arm, seed, folder) if needed else None
            except StoreError as error:
                raise StoreError(f"{error}. Remove {folder} and resume, to train this one again") from error
            return model, ArmRun(**{**state, "evaluation": _evaluation(state["evaluation"])})
        target = self.build_target(seed, arm.fresh)
        trainer = self.trainer(arm, seed, target, folder)
        began = time.monotonic()
        model = trainer.fit(resume=resume)
        seconds = time.monotonic() - began
        measured = None if self.test is None else self._evaluate(model, self.test, reference, method=trainer.method)
        run = ArmRun(
            seed,
            seconds,
            trainer.updates,
            trainer.history,
            list(trainer.watch.messages.values()),
            measured,
            trainer.stages,
            trainer.method.panels(),
        )
        if folder and self.sync.rank == 0:
            save_weights(folder / "model.safetensors", model)
            if model is not target:
                save_state(folder / "trained.safetensors", trainer.state())
            save_state(folder / "run.safetensors", {**vars(run), "evaluation": measured and measured.state()})
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        self.sync.barrier()
        return model, run

    def _finished(self, arm: Arm, seed: int, folder: Path) -> nn.Module:
        """The model of a run that was finished before; what a method has built around the target is built again."""
        target = self.build_target(seed, arm.fresh)
        if (folder / "trained.safetensors").exists():
            return self.trainer(arm, seed, target).restore(load_state(folder / "trained.safetensors"))
        load_weights(folder / "model.safetensors", target)
        return target

    def trainer(self, arm: Arm, seed: int, target: nn.Module, folder: Path | None = None) -> Trainer:
        """The trainer of one arm with one seed."""
        data, training = self.data, replace(self.training, seed=seed)
        if arm.labelled_only:
            data, training = self._labelled(training)
        if arm.shuffled and "source" in data:
            data = {**data, "source": data["source"].shuffled_labels(seed)}
        roles = {"target": target}
        if arm.method.uses_source:
            sources = self._sources_of(arm.method)
            roles |= copy.deepcopy(sources) if arm.method.moves_source else sources
        if folder:
            folder = folder / "checkpoints"
            make_folder(folder)
        method = copy.deepcopy(arm.method)
        return Trainer(
            method,
            roles,
            data,
            training,
            folder=folder,
            validate=self._score,
            higher_is_better=HIGHER_IS_BETTER.get(str(self._validation_metric), True),
            sync=self.sync,
            task=self.task,
            shuffled=arm.shuffled and bool(self.sources),
            score_stage=partial(self._score_stage, method) if method.scored_by_stage and self.test else None,
            listener=partial(self._tell, arm.name, seed),
        )

    def _labelled(self, training: Training) -> tuple[dict[str, Data], Training]:
        """Only the samples with labels, for as many updates as the method has."""
        data = next((self.data[name] for name in ("source", "labelled", "data") if name in self.data), None)
        if data is None:
            raise InputError(
                f"'scratch' and 'finetune' learn from one data set, these are several: {', '.join(self.data)}. "
                "Compare with a method of the same family instead"
            )
        if self.task != "classification" or not isinstance(data, Indexed):
            return {"data": data}, training
        labelled = data.labelled()
        steps = training.steps or max(1, round((training.epochs or 0) * data.updates(training.batch_size)))
        size = min(training.batch_size, labelled.size)
        every = training.validate_every or data.updates(training.batch_size)
        return {"data": labelled}, replace(training, epochs=None, steps=steps, batch_size=size, validate_every=every)

    @cached_property
    def _validation_metric(self) -> str | None:
        if self.validate is not None and self.select not in (None, ORACLE):
            return self.select
        return None if self.validate is None else main_metric(self.task, has_labels(self.validate.sample(8)))

    @cached_property
    def _score(self) -> Callable[[nn.Module], float] | None:
        """What validates the target: one function for all arms and seeds, so that the source runs for it once."""
        data, metric = self.validate, self._validation_metric
        if data is None or metric is None:
            return None
        if metric in VALIDATORS:
            validator, blind = VALIDATORS[metric], data.without_labels()

            def score(model: nn.Module) -> float:
                logits = self._evaluate(model, blind, None, compared=False).logits
                assert logits is not None
                return float(validator(logits))

            return score
        # The source takes part only where the score is about it.
        compared = metric == "agreement"
        reference = self._reference(data) if compared else None
        return lambda model: self._evaluate(model, data, reference, compared).metrics[metric]

    # Measuring -------------------------------------------------------------------------------------------------

    def _evaluate(
        self,
        model: nn.Module,
        data: Data,
        reference: Evaluation | None,
        compared: bool = True,
        method: Method | None = None,
    ) -> Evaluation:
        """Measure a model; in classification against the source's own evaluation, else batch by batch against it."""
        return evaluate(
            model,
            data,
            task=self.task,
            batch_size=self.training.batch_size,
            source=self._measured_against if compared and self.task != "classification" else None,
            reference=reference,
            is_correct=correct if method is None or _is_top1(method) else method.correct,
        )

    def _score_stage(self, method: Method, model: nn.Module) -> dict[str, float]:
        """The metric on every held-out set, of the model that a method would deploy after a stage."""
        assert self.test is not None
        found = self._evaluate(model, self.test, None, compared=False, method=method)
        return found.by_set(self.metric) or {"test": found.metrics[self.metric]}

    def _reference(self, data: Data | None) -> Evaluation | None:
        if self._measured_against is None or data is None:
            return None
        return evaluate(self._measured_against, data, task=self.task, batch_size=self.training.batch_size)

    def _measure_source(self) -> Evaluation | None:
        for model in self.sources.values():
            move(model, self.sync.device)
        return self._reference(self.test)

    def _facts(self, sample: Batch, reference: Evaluation | None, model: nn.Module) -> Facts:
        inputs = sample.slice(0, 1).to(self.sync.device).inputs
        footprints = {
            role: None if m is None else footprint(move(m, self.sync.device), inputs)
            for role, m in (("source", self._measured_against), ("target", model))
        }
        classes = self.classes
        if classes is None and reference and reference.logits is not None and reference.labels is not None:
            classes = [str(i) for i in range(reference.logits.shape[1])]
        return Facts(
            name=self.name,
            method=repr(self.method),
            task=self.task,
            metric=self.metric,
            source=self._named_source(reference),
            classes=classes,
            cost=footprints,
            recipe=self.recipe,
            warnings=self._notes(),
            panels=self._panels(model),
        )

    def _panels(self, model: nn.Module) -> list[dict[str, Any]]:
        """The two domains before and after an adaptation."""
        if not _from_data(self.method) or self.method.brings_head:
            return []
        held_out = self.data["data"] if self.test is None else self.test
        before = self.build_target(self.seeds[0]).to(self.sync.device)
        return domain_panels(before, model, {"source": self.data["source"], "target": held_out})

    def _named_source(self, reference: Evaluation | None) -> tuple[str, Evaluation | None] | None:
        if self.sources:
            return ", ".join(type(model).__name__ for model in self.sources.values()), reference
        return ("labelled data", None) if "source" in self.data else None

    def _notes(self) -> list[str]:
        notes = []
        if self.select == ORACLE and self.method.select:
            notes.append("The best state was chosen with labels of the target domain: an oracle, not a result.")
        if self.test is not None and self.test is self.validate:
            notes.append("No test data was given: the report is about the validation data.")
        if isinstance(self.target, nn.Module) and len(self.seeds) > 1:
            notes.append(
                "The target was given as a model, so all seeds share its initial weights; pass a function that "
                "builds it to see how much they matter."
            )
        return notes

    # Files -----------------------------------------------------------------------------------------------------

    def _claim_folder(self, resume: bool) -> None:
        """Take the output folder, or refuse one that holds something else."""
        if self.out is None:
            if resume:
                raise InputError("there is nothing to resume: no folder was given as out")
            return
        if self.sync.rank == 0:
            described = {
                "arms": [arm.name for arm in self.arms],
                "seeds": self.seeds,
                "recipe": self.recipe,
                "samples": {
                    name: data.size for name, data in self._all_data().items() if isinstance(data, Indexed | HeldOut)
                },
                "source": [sum(fingerprint(model).values()) for model in self.sources.values()],
            }
            mine, claim = json.dumps(described, default=str), self.out / "transfer.json"
            if claim.exists() and not resume:
                raise InputError(f"{self.out} holds a transfer already: resume it, or choose another folder")
            if claim.exists() and _read_json(claim) != json.loads(mine):
                raise InputError(
                    f"{self.out} holds another transfer, with other arms, seeds, recipe, data or source: see {claim}"
                )
            make_folder(self.out)
            write_atomically(claim, mine)
        self.sync.barrier()

    def _describe(self, training: Mapping[str, Any]) -> dict[str, Any]:
        plain = {k: v if isinstance(v, str | int | float | bool | None) else repr(v) for k, v in training.items()}
        return {
            "method": repr(self.method),
            "source": (self._named_source(None) or (None,))[0],
            "target": type(self.target).__name__
            if isinstance(self.target, nn.Module)
            else getattr(self.target, "__qualname__", type(self.target).__name__),
            "compare": [arm.name for arm in self.arms[1:]],
            "seeds": list(self.seeds),
            **plain,
        }


def _require(method: Method, source: nn.Module) -> None:
    """Check the source against every part of a method."""
    for part in method.parts:
        require(source, part.card.sources, type(part).__name__, ", ".join(working_with(gives(source))))


def _evaluation(state: dict[str, Any] | None) -> Evaluation | None:
    return None if state is None else Evaluation(**state)


def _from_data(method: Method) -> bool:
    """Whether a method's source is a labelled data set."""
    return any(part.card.teacher == "data" for part in method.parts)


def _is_control(method: Method) -> bool:
    return all(part.card.control for part in method.parts)


def _is_top1(method: Method) -> bool:
    """Whether a sample is answered correctly when the label's logit is the largest, and every label has one."""
    return all(type(part).correct is Method.correct and not part.brings_head for part in method.parts)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path} ({error}): remove it if this folder is that of this transfer") from error

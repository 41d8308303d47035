"""Neuron Specialization: every task trains the rows of the feed-forward layers whose neurons it uses."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.continual.base import read
from transfuse.core.batch import Batch, line_up
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.method import Bag, Method
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Data
from transfuse.core.taps import resolve
from transfuse.losses import IGNORE, Term, cross_entropy
from transfuse.weights.base import Setting, settled
from transfuse.weights.masks import MaskedModel, TaskBatches, key, masked, shared, smallest_prefix, task_pools

HELD = "/validation"
FEWEST = 200
PADDING = {"*decoder*": "decoder_attention_mask", "*": "attention_mask"}


class NeuronSpecialization(Method):
    """Go on training a multi-task model with one sparse feed-forward sub-network per task, all in the same weights.

        c[j]  how often neuron j is not 0 after the ReLU, over all positions of the task's validation data
        S     the fewest neurons whose counts add up to k percent of the sum, in every layer
        W_task = m_S (*) W of fc1, row by row;  loss = CE(labels) with smoothing, batches of one task each

    The target is the dense model, trained on all tasks. Rows that a task has not chosen get no gradient from it; fc2,
    attention, embeddings and (unless `mask_bias`) the bias of fc1 are shared by all. Data are named tasks, each with
    its validation data: `data={"en-de": ..., "en-de/validation": ..., ...}`; without that, training data are counted.
    The deployed model is a :class:`~transfuse.weights.masks.MaskedModel`: `model(inputs, task="en-de")`, or
    `model.of("en-de")`, a plain model; for a task without a mask, `model.union([...])`.

    Args:
        percent: k, in (0, 100]; or a mapping from patterns of "task/layer" to it: `{"en-*/decoder*": 90, "*": 95}`.
        fc1, fc2: taps of the layers before and behind the ReLU, in the same order.
        label_smoothing: in [0, 1).
        temperature: tasks are drawn in proportion to size ** (1 / temperature).
        mask_bias: whether the bias of fc1 is masked, too.
        count_padding: whether neurons are counted at padding, as the authors' code does.
        random: choose as many neurons at random: the control.

    Raises:
        InputError: an argument is out of range; no data sets; layers that do not belong together; an activation that is
            no ReLU, for it is never exactly 0; a layer in which nothing is ever active.

    Source: Tan, Wu & Monz, EMNLP 2024, arXiv:2404.11201.
    """

    card = Card(
        paper="Tan, Wu & Monz, EMNLP 2024",
        arxiv="2404.11201",
        sheet=113,
        carries="weights",
        teacher="none",
        data="labelled",
        tasks=("classification", "token-classification", "language-model"),
    )
    family = "weights"
    uses_source = False

    def __init__(
        self,
        percent: Setting = 95.0,
        fc1: str = "*.fc1",
        fc2: str = "*.fc2",
        label_smoothing: float = 0.1,
        temperature: float = 1.0,
        mask_bias: bool = False,
        count_padding: bool = False,
        random: bool = False,
    ):
        super().__init__()
        for value in percent.values() if isinstance(percent, Mapping) else [percent]:
            if not 0 < value <= 100:
                raise InputError(f"NeuronSpecialization: percent is {value}, it must be in (0, 100]")
        if not 0 <= label_smoothing < 1 or not temperature > 0:
            raise InputError(
                f"NeuronSpecialization: label_smoothing is {label_smoothing}, in [0, 1), and temperature "
                f"{temperature}, above 0"
            )
        self.percent, self.fc1, self.fc2 = percent, fc1, fc2
        self.label_smoothing, self.temperature = label_smoothing, temperature
        self.mask_bias, self.count_padding, self.random = mask_bias, count_padding, random
        self.chosen = Bag()
        """For every task and fc1, which rows it has."""

    def setup(self, run: Run, sample: Batch | None) -> None:
        self.chosen = Bag()
        self._tasks = task_pools("NeuronSpecialization", {n: d for n, d in run.data.items() if not n.endswith(HELD)})
        before, behind = resolve(run["target"], self.fc1), resolve(run["target"], self.fc2)
        if len(before) != len(behind):
            raise InputError(f"{self.fc1!r} names {len(before)} layers and {self.fc2!r} names {len(behind)}: pair them")
        self._pairs = dict(zip(before, behind, strict=True))
        for one, other in self._pairs.items():
            rows = run["target"].get_parameter(f"{one}.weight").shape[0]
            columns = run["target"].get_parameter(f"{other}.weight").shape[1]
            if rows != columns:
                raise InputError(
                    f"{one!r} has {rows} neurons and {other!r} reads {columns}: they do not belong together"
                )
        run.tap("target", [f"{path}:input" for path in behind])

    def begin_stage(self, i: int, run: Run) -> bool:
        if i:
            return False
        with run.probe():
            run.set_modes(set())
            for number, task in enumerate(self._tasks):
                counts = self._counts(task, run.data.get(task + HELD, self._tasks[task]), run)
                for path, count in counts.items():
                    percent = settled(self.percent, f"{task}/{path}", 0.0, "percent")
                    mask = smallest_prefix(count, float(percent))
                    if self.random:
                        mask = mask[torch.randperm(len(mask), generator=run.shared_rng(task, path)).to(mask.device)]
                    self.chosen[key(number, path)] = mask
        return True

    def stage(self, i: int, run: Run) -> Stage:
        batches = TaskBatches(self._tasks, self.temperature)
        return Stage({"data": batches}, [Phase("specialised", self.losses, run["target"].parameters())])

    def losses(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        params = masked(run["target"], self.masks(int(batch.domain[0]), run["target"]))
        logits = run("target", batch, params=params).logits
        values = cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        return {"labels": Term.of(values, batch.labels != IGNORE, "labelled")}

    def masks(self, task: int, target: nn.Module) -> dict[str, Tensor]:
        """The masks of a task by the name of the parameter."""
        found = {}
        for path in self._pairs:
            mask = self.chosen[key(task, path)]
            found[f"{path}.weight"] = mask
            if self.mask_bias and target.get_submodule(path).bias is not None:
                found[f"{path}.bias"] = mask
        return found

    def deploy(self, target: nn.Module) -> nn.Module:
        masks = {task: self.masks(number, target) for number, task in enumerate(self._tasks)}
        return MaskedModel(copy.deepcopy(target), masks)

    def panels(self) -> list[dict[str, Any]]:
        if not len(list(self.chosen.buffers())):
            return []
        tasks, layers = list(self._tasks), list(self._pairs)
        stacked = [torch.stack([self.chosen[key(t, path)] for t in range(len(tasks))]).cpu() for path in layers]
        return [
            shared("Neurons that tasks share", "the chosen neurons", tasks, stacked),
            {
                "kind": "matrix",
                "title": "Neurons that each task has",
                "note": "As a share of the layer's.",
                "rows": layers,
                "columns": tasks,
                "values": [masks.float().mean(1).tolist() for masks in stacked],
            },
        ]

    def _counts(self, task: str, data: Data, run: Run) -> dict[str, Tensor]:
        """How often each neuron of each layer is active on the data of a task."""
        counts: dict[str, Tensor] = {}
        samples = 0
        for raw in read(data):
            batch = line_up(raw, run.task).to(run.device)
            samples += batch.size
            features = run("target", batch, grad=False).features
            for path, behind in self._pairs.items():
                active = features[f"{behind}:input"]
                if (active < 0).any():
                    raise InputError(
                        f"the activation before {behind!r} is no ReLU, so its neurons are never exactly 0, none unused"
                    )
                on = (active != 0).flatten(0, -2)[self._real(path, batch, active)]
                counts[path] = counts.get(path, 0) + on.sum(0)
        if samples < FEWEST:
            run.watch.say(
                f"few samples: {task}", f"{task!r} is counted on {samples} samples: below {FEWEST} it is noisy"
            )
        return counts

    def _real(self, path: str, batch: Batch, active: Tensor) -> Any:
        """Which positions of a layer are no padding."""
        name = next(given for pattern, given in PADDING.items() if fnmatchcase(path, pattern))
        mask = batch.inputs.get(name) if isinstance(batch.inputs, Mapping) else None
        if self.count_padding or mask is None or mask.shape != active.shape[:-1]:
            return slice(None)
        return mask.flatten().bool()

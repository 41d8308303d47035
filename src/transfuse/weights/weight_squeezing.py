"""Weight Squeezing: a narrow student's weights are learned linear maps of a wide teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError, ShapeError
from transfuse.core.labels import labels_term
from transfuse.core.output_layer import find_output_layer
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.taps import batch_norms
from transfuse.core.teaching import teach
from transfuse.losses import Divergence
from transfuse.weights.layout import heads_of, layers_of, reads_inputs, transposed
from transfuse.weights.maps import Mapped, Rule, counterparts, crop, gaussian, key_of

WEIGHED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
GATE = -4.0
"""Logit of a gate in the beginning: 2% of a weight come from the teacher's."""


class WeightSqueezing(Mapped):
    """Learn a narrow student as linear maps of a trained, wide teacher's frozen weights; then fold the maps away.

        W_s = L W_t R                                       matrices: L (k, n), W_t (n, m), R (m, l), all of its own
        b_s = L_b b_t                                       vectors: biases, scales of norms
        E_s = E_t R                                         embeddings, whose tokens stay
        W_s = sigma(g) * (L W_t R) + (1 - sigma(g)) * W_p   gated; g and the pre-trained student's W_p are trained too

    Layer j of the student is made from layer floor(j * L_t / L_s) of the teacher. L and R are Gaussian with variances
    1 / n and 1 / m, so that W_s has the teacher's variance. Maps along axes that stand for the same things in both
    (classes, pixels) and those of norms start as a crop: a norm of Gaussian scale would be dead. Parameters that the
    teacher has no counterpart of are trained as they are. W_s is linear in L and in R, so gradients grow with their
    product: clip them.

    Args:
        gated: mix in the target as given, which should be trained; gates start at 2%.
        init: `"gaussian"`, or `"crop"`: start as the teacher's first rows and columns.
        layers: the teacher's layer for each of the target's.
        alpha: weight of the teacher's outputs, in [0, 1]; 0 learns from labels alone, and the teacher does not run.
        temperature: of the outputs, T > 0.
        lr_scale: factor of the caller's learning rate for maps and gates.
        allow_grow: let the student be wider than the teacher.

    Raises:
        InputError: an argument is out of its range; the teacher is in half precision, or has other heads and no
            `layers` say that it is meant; batch normalisation in a student that is not gated; nothing corresponds.
        ShapeError: a parameter cannot come from its counterpart.

    Source: Chumachenko, Gavrilov, Balagansky & Kalaidin, 2020, arXiv:2010.06993.
    """

    card = Card(
        paper="Chumachenko et al., 2020",
        arxiv="2010.06993",
        sheet=31,
        carries="weights",
        teacher="weights",
        data="labelled",
        tasks=("classification", "language-model", "token-classification"),
    )

    def __init__(
        self,
        gated: bool = False,
        init: str = "gaussian",
        layers: Sequence[int] | None = None,
        alpha: float = 0.0,
        temperature: float = 1.0,
        lr_scale: float = 1.0,
        allow_grow: bool = False,
    ):
        super().__init__()
        if init not in ("gaussian", "crop"):
            raise InputError(f"WeightSqueezing: init is {init!r}, it must be 'gaussian' or 'crop'")
        if not 0 <= alpha <= 1 or not temperature > 0 or not lr_scale > 0:
            raise InputError(
                f"WeightSqueezing: alpha is {alpha}, temperature {temperature}, lr_scale {lr_scale}: alpha must lie in "
                "[0, 1], the others must be positive"
            )
        self.gated, self.init, self.alpha, self.temperature = gated, init, alpha, temperature
        self.layers, self.lr_scale, self.allow_grow = layers, lr_scale, allow_grow
        self.gates = nn.ParameterDict()

    def setup(self, run: Run, sample: Batch | None) -> None:
        if sample is None:
            raise InputError("WeightSqueezing learns from data: pass data=...")
        own, theirs = self.begin(run)
        target = run["target"]
        heads = heads_of(target), heads_of(run["source"])
        if None not in heads and heads[0] != heads[1] and self.layers is None:
            raise InputError(
                f"the target has {heads[0]} attention heads, the source {heads[1]}, and maps mix them: if that is "
                "meant, say so by naming the source's layer for each of the target's with layers=[...]"
            )
        if not self.gated and batch_norms(target):
            raise InputError(
                "the target's batch normalisation keeps statistics of weights that do not move here: use gated=True, "
                "or a target with another normalisation"
            )
        names = counterparts(own, theirs, self.layers)
        same = _shared_axes(target, sample.inputs)
        modules, norms, fused = dict(target.named_modules()), _norms(target), _fused(target)
        for name, p in own.items():
            if names[name] not in theirs:
                continue
            old = theirs[names[name]]
            self._require_fit(name, p, old)
            keys: list[str | None] = []
            kept = _kept_axes(modules[name.rpartition(".")[0]], p, old)
            for axis, (k, n) in enumerate(zip(p.shape, old.shape, strict=True)):
                if axis in kept:
                    keys.append(None)
                    continue
                start = crop if (name, axis) in same or name in norms or self.init == "crop" else gaussian
                if (name, axis) in fused and start is crop:
                    start = _three_crops
                self.maps[key_of(name, axis)] = nn.Parameter(start(k, n))
                keys.append(key_of(name, axis))
            self.put(name, Rule(names[name], tuple(keys)), p.shape)
        if not self._rules:
            raise InputError("no parameter of the target has the name of one of the source's: pass models of one kind")
        if alone := [name for name in own if name not in self._rules]:
            run.watch.say("parameters without a counterpart", f"the source has none for {', '.join(alone[:5])}")
        gated = [name for name in self._rules if self.gated]
        self.gates = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(torch.full_like(own[name], GATE)) for name in gated}
        )
        self.to(run.device)
        if self.alpha:
            self.loss({"data": sample}, run)

    def compose(self, target: nn.Module) -> dict[str, Tensor]:
        found, own = super().compose(target), dict(target.named_parameters())
        for name in found if self.gated else ():
            share = self.gates[name.replace(".", "/")].sigmoid()
            found[name] = share * found[name] + (1 - share) * own[name]
        return found

    def thawed(self, target: nn.Module) -> list[nn.Parameter]:
        return list(target.parameters()) if self.gated else super().thawed(target)

    def loss(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        if batch.labels is None and self.alpha < 1:
            raise InputError("WeightSqueezing needs labels, this data has none: pass alpha=1 to learn from the teacher")
        student = self.run_composed(run, batch)
        if not self.alpha:
            return {"labels": labels_term(student.learning, batch)}
        teacher = run("source", batch.for_source(), grad=False)
        return teach("kd", Divergence("forward", temperature=self.temperature), student, teacher, batch, self.alpha)

    def stage(self, i: int, run: Run) -> Stage:
        stage = super().stage(i, run)
        learned = [*self.maps.values(), *self.gates.values()]
        groups: list[dict[str, Any]] = [
            {"params": learned, "lr_scale": self.lr_scale},
            {"params": self.thawed(run["target"])},
        ]
        return Stage(stage.streams, [Phase("maps", self.loss, groups)])

    def panels(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if series := self.spectra():
            found.append(
                {
                    "kind": "lines",
                    "title": "Singular values of the student's matrices from the teacher",
                    "note": "Relative to the largest of each.",
                    "x": "rank",
                    "y": "singular value",
                    "series": series,
                }
            )
        if self.gates:
            shares = [float(g.detach().sigmoid().mean()) for g in self.gates.values()]
            found.append(
                {
                    "kind": "bars",
                    "title": "Share of the teacher in each parameter",
                    "note": "Mean of the gates.",
                    "rows": ["sigma(g)"],
                    "groups": [k.replace("/", ".") for k in self.gates],
                    "values": [shares],
                }
            )
        return found

    def _require_fit(self, name: str, p: Tensor, old: Tensor) -> None:
        if p.dim() != old.dim():
            raise ShapeError(f"the target's {name} is {tuple(p.shape)}, the source's {tuple(old.shape)}: no map fits")
        if not self.allow_grow and any(k > n for k, n in zip(p.shape, old.shape, strict=True)):
            raise ShapeError(
                f"the target's {name} is {tuple(p.shape)}, wider than the source's {tuple(old.shape)}: squeezing needs "
                "a narrower target, or allow_grow=True"
            )


def _kept_axes(module: nn.Module, p: Tensor, old: Tensor) -> set[int]:
    """The axes without a map: an embedding's tokens, a kernel's places, and what does not differ in other tensors."""
    if isinstance(module, nn.Embedding):
        return {0}
    if p.dim() == 1 or isinstance(module, WEIGHED) or type(module).__name__ == "Conv1D":
        return set(range(2, p.dim()))
    return {axis for axis in range(p.dim()) if p.shape[axis] == old.shape[axis]}


def _shared_axes(model: nn.Module, inputs: Any) -> set[tuple[str, int]]:
    """Axes that stand for the same things in every model of the task: what is read, and the classes."""
    output, first = find_output_layer(model, inputs), reads_inputs(model, inputs)
    found: set[tuple[str, int]] = set()
    for path, module in model.named_modules():
        if module is output:
            found |= {(f"{path}.weight", 0), (f"{path}.bias", 0)}
        if module in first and isinstance(module, WEIGHED):
            found.add((f"{path}.weight", 1))
    return found


def _fused(model: nn.Module) -> set[tuple[str, int]]:
    """Axes along which query, key and value lie side by side."""
    try:
        layers = layers_of(model)
    except InputError:  # no transformer
        return set()
    paths = [layer.attention[0] for layer in layers if len(layer.attention) == 1]
    weights = {(f"{path}.weight", int(transposed(model.get_submodule(path)))) for path in paths}
    return weights | {(f"{path}.bias", 0) for path in paths}


def _three_crops(new: int, old: int) -> Tensor:
    return torch.block_diag(*[crop(new // 3, old // 3)] * 3)


def _norms(model: nn.Module) -> set[str]:
    """Names of the parameters of layers whose weight is a vector."""
    layers = {
        path: m
        for path, m in model.named_modules()
        if isinstance(w := getattr(m, "weight", None), Tensor) and w.dim() == 1
    }
    return {f"{path}.{name}" for path, m in layers.items() for name, _ in m.named_parameters(recurse=False)}

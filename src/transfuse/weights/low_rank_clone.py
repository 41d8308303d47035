"""Low-Rank Clone: a student whose every weight is a projection of its teacher's, and who acts like it within."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.core.batch import Batch, real_tokens
from transfuse.core.card import Card
from transfuse.core.errors import InputError, ShapeError
from transfuse.core.phases import Batches, Losses
from transfuse.core.run import Run
from transfuse.core.teacher import same_classes
from transfuse.losses import IGNORE, Divergence, Term, match
from transfuse.weights.layout import Layer, layers_of
from transfuse.weights.maps import Mapped, Rule

TERMS = ("q", "k", "v", "attention", "gate", "up", "ffn")
HEAD_STD = 0.01
"""Of the output layer's own map, in the authors' code."""


class LowRankClone(Mapped):
    """Learn low-rank projections of a frozen language model's weights, and the activations that go with them.

        E_s = E Z_e^T,   H_s = H Z_h^T                         embedding and output layer, Z (d_s, d_t)
        W_s = W Z^T                                            q, k, v, gate and up, which read the stream
        W_s = Z W                                              o and down, which write into it
        loss = CE + alpha * sum over layers of MSE(q, k, v, o_t(attention), gate, up, down_s - Z_down down_t) + KL_T

    Only the projections and the student's norms are trained; heads, their size and the perceptron's width are the
    teacher's. Attention outputs are compared behind the teacher's o, at its width; outputs of the perceptron at the
    student's, where the target moves with Z_down. The teacher runs on its own stream beside the student. Padding counts
    in no term. At the end every product is folded, and the target is a plain model of its class.

    `target` gives the architecture: the teacher's, with hidden size d_s and the teacher's `head_dim`; Llama, Mistral
    and Qwen have that, and every model that calls its layers `q_proj`, ..., `down_proj`.

    Args:
        alpha: weight of the activations.
        temperature: T of the KL. 40 is the paper's recipe, 10 its code's default.
        reduction: of the KL, which has no factor T^2: `"batchmean"` sums over tokens and divides by the samples, as the
            authors do, so that it grows with their length; `"token"` divides by the tokens.
        without: terms of the activations to leave out, of `"q"`, `"k"`, `"v"`, `"attention"`, `"gate"`, `"up"`,
            `"ffn"`.
        inputs: `"all"`, or `"io"`: q, k and v of a layer share one projection.
        tie_head: Z_h = Z_e.
        std: of the projections' first numbers; 0.02 suits a teacher whose width is in the thousands, 1 / sqrt(d_t) any.

    Raises:
        InputError: an argument is out of its range; a model's layers are not found, or they differ in number.
        ShapeError: heads, head size, perceptron or vocabulary are not the teacher's.

    Source: Hao et al., NeurIPS 2025, arXiv:2505.12781; the authors' code.
    """

    card = Card(
        paper="Hao et al., NeurIPS 2025",
        arxiv="2505.12781",
        sheet=51,
        carries="weights",
        teacher="features",
        data="unlabelled",
        tasks=("language-model",),
    )
    units = {"real": lambda batch: real_tokens(batch).sum()}  # noqa: RUF012

    def __init__(
        self,
        alpha: float = 0.2,
        temperature: float = 40.0,
        reduction: str = "batchmean",
        without: Sequence[str] = (),
        inputs: str = "all",
        tie_head: bool = True,
        std: float = 0.02,
    ):
        super().__init__()
        if alpha < 0 or not temperature > 0 or not std > 0:
            raise InputError(
                f"LowRankClone: alpha is {alpha}, temperature {temperature}, std {std}: alpha must not be negative, "
                "the others must be positive"
            )
        if reduction not in ("batchmean", "token"):
            raise InputError(f"LowRankClone: reduction is {reduction!r}, it must be 'batchmean' or 'token'")
        if inputs not in ("all", "io"):
            raise InputError(f"LowRankClone: inputs is {inputs!r}, it must be 'all' or 'io'")
        if isinstance(without, str) or not set(without) <= set(TERMS):
            raise InputError(f"LowRankClone: without is {without!r}, expected a list of {', '.join(TERMS)}")
        self.alpha, self.temperature, self.reduction, self.without = alpha, temperature, reduction, without
        self.inputs, self.tie_head, self.std = inputs, tie_head, std
        self._pairs: list[tuple[Layer, Layer]] = []

    def setup(self, run: Run, sample: Batch | None) -> None:
        if sample is None:
            raise InputError("LowRankClone needs text to run the teacher on: pass data=...")
        own, source = self.begin(run)
        layers, theirs = layers_of(run["target"]), layers_of(run["source"])
        if len(layers) != len(theirs):
            raise InputError(f"the target has {len(layers)} layers, the source {len(theirs)}: a clone has all of them")
        if len(layers[0].attention) != 3 or len(layers[0].rise) != 2:
            raise InputError("LowRankClone needs separate layers for q, k, v, gate and up, as Llama has")
        self._pairs = list(zip(layers, theirs, strict=True))
        d_s = own[f"{layers[0].rise[0]}.weight"].shape[1]
        d_t = source[f"{theirs[0].rise[0]}.weight"].shape[1]
        if d_s > d_t:
            raise ShapeError(f"the target's stream is {d_s} wide, the source's {d_t}: a clone is narrower")
        for i, (layer, other) in enumerate(self._pairs):
            shared = self.inputs == "io"
            for name, path, teacher in zip("qkv", layer.attention, other.attention, strict=True):
                self._reads(own, path, teacher, f"{i}/{'qkv' if shared else name}", (d_s, d_t))
            self._writes(own, layer.output, other.output, f"{i}/o", (d_s, d_t))
            for name, path, teacher in zip(("gate", "up"), layer.rise, other.rise, strict=True):
                self._reads(own, path, teacher, f"{i}/{name}", (d_s, d_t))
            self._writes(own, layer.down, other.down, f"{i}/down", (d_s, d_t))
        self._ends(run, own, (d_s, d_t))
        run.tap("target", [name for layer in layers for name in _read(layer)])
        run.tap("source", [name for layer in theirs for name in _read(layer)])
        self.to(run.device)
        outputs = self.run_composed(run, sample, grad=False), run("source", sample, grad=False)
        same_classes(outputs[0].scores, outputs[1].scores)

    def loss(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        student, teacher = self.run_composed(run, batch), run("source", batch, grad=False)
        divergence = Divergence("forward", temperature=self.temperature, temperature_squared=False)
        values, entropy = match(
            student.learning, teacher.scores, divergence, labels=batch.labels, rows=batch.mask, expect=(1.0, 1.0)
        )
        kl = Term.of(values, batch.mask)
        assert entropy is not None
        found = {
            "labels": Term.of(entropy, batch.labels != IGNORE, "labelled"),
            "kl": Term(kl.sum, batch.size, "sample") if self.reduction == "batchmean" else kl,
        }
        real = real_tokens(batch)
        clones = self.clones(run, student.features, teacher.features)
        return found | {name: self.alpha * Term.of(values, real, "real") for name, values in clones.items()}

    def clones(self, run: Run, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
        """The squared error of every kind of activation, `(batch, tokens)`, the sum of all layers.

        Args:
            student, teacher: what the taps of each read.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in TERMS if name not in self.without}
        for i, (layer, other) in enumerate(self._pairs):
            pairs = dict(zip(("q", "k", "v"), zip(layer.attention, other.attention, strict=True), strict=True))
            pairs |= dict(zip(("gate", "up"), zip(layer.rise, other.rise, strict=True), strict=True))
            for name in found:
                if name in pairs:
                    ours, theirs = student[pairs[name][0]], teacher[pairs[name][1]]
                elif name == "attention":
                    o: Any = run["source"].get_submodule(other.output)
                    ours, theirs = F.linear(student[f"{layer.output}:input"], o.weight, o.bias), teacher[other.output]
                else:
                    ours, theirs = student[layer.down], teacher[other.down] @ self.maps[f"{i}/down"].T
                found[name].append((ours - theirs).square().mean(-1))
        return {name: torch.stack(values).sum(0) for name, values in found.items()}

    def panels(self) -> list[dict[str, Any]]:
        if not self._pairs:
            return []
        kept = ("q", "k", "v", "o", "gate", "up", "down")
        names = ("qkv", *kept[3:]) if self.inputs == "io" else kept
        values = [[_directions(self.maps[f"{i}/{name}"]) for name in names] for i in range(len(self._pairs))]
        return [
            {
                "kind": "matrix",
                "title": "Directions of the teacher's stream that each projection uses",
                "note": "Participation ratio of its squared singular values; at most the student's width.",
                "rows": [f"layer {i}" for i in range(len(self._pairs))],
                "columns": list(names),
                "values": values,
            }
        ]

    def _map(self, key: str, size: tuple[int, int], std: float) -> str:
        if key not in self.maps:
            self.maps[key] = nn.Parameter(torch.randn(size) * std)
        return key

    def _reads(self, own: Any, path: str, teacher: str, key: str, size: tuple[int, int]) -> None:
        self._linear(own, path, teacher, (None, self._map(key, size, self.std)))

    def _writes(self, own: Any, path: str, teacher: str, key: str, size: tuple[int, int]) -> None:
        self._linear(own, path, teacher, (self._map(key, size, self.std), None))

    def _linear(self, own: Any, path: str, teacher: str, maps: tuple[str | None, str | None]) -> None:
        self.put(f"{path}.weight", Rule(f"{teacher}.weight", maps), own[f"{path}.weight"].shape)
        if f"{path}.bias" in own:
            self.put(f"{path}.bias", Rule(f"{teacher}.bias", maps[:1]), own[f"{path}.bias"].shape)

    def _ends(self, run: Run, own: Any, size: tuple[int, int]) -> None:
        """Embedding and output layer: what is a matrix and in no block."""
        inside = {f"{path}.weight" for layer, _ in self._pairs for path in (*layer.attention, *layer.rise)}
        inside |= {f"{path}.weight" for layer, _ in self._pairs for path in (layer.output, layer.down)}
        theirs = dict(run["source"].named_parameters(remove_duplicate=False))
        for name, p in own.items():
            if p.dim() == 2 and name not in inside:
                if name not in theirs:
                    raise InputError(f"the source has no {name!r}, which the target has: build both from one class")
                module = run["target"].get_submodule(name.rpartition(".")[0])
                embeds = self.tie_head or isinstance(module, nn.Embedding)
                key = self._map("embed" if embeds else "head", size, self.std if embeds else HEAD_STD)
                self.put(name, Rule(name, (None, key)), p.shape)


def _read(layer: Layer) -> list[str]:
    return [*layer.attention, f"{layer.output}:input", layer.output, *layer.rise, layer.down]


def _directions(projection: Tensor) -> float:
    values = torch.linalg.svdvals(projection.detach().float().cpu()).square()
    return float(values.sum() ** 2 / values.square().sum())

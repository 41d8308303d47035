"""Neural Nuggets: the part of a larger model that a task needs, cut out and planted as a low-rank adapter."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.adapters import adapted, factors, layers_to_adapt, turned
from transfuse.core.batch import Batch, line_up
from transfuse.core.card import Card
from transfuse.core.errors import DivergenceError, InputError, ShapeError, VocabularyError, nearest
from transfuse.core.labels import labels_term
from transfuse.core.method import Bag, Method
from transfuse.core.output_layer import find_output_layer
from transfuse.core.outputs import eager
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.sensitivity import add_sensitivity, leaves
from transfuse.core.streams import Indexed
from transfuse.losses import IGNORE
from transfuse.losses.windows import best_rows_columns, best_window, low_rank

WINDOWS = ("sensitive", "rows_cols", "random")


class NeuralNuggets(Method):
    """Begin a low-rank adapter with the sub-matrices of a larger model that a task is most sensitive to.

        S = sum over samples of |theta * dL/dtheta|            of the source, on few samples of the task
        source layers: those with the largest sum of S, as many as the target has, in their order
        E (a, b) = the window of W_source (a', b') with the largest sum of S
        U S V^T = E;    B_0 = U S (a, r), A_0 = V^T (r, b)     the r largest singular values
        W = W_target - alpha / r * B_0 A_0 + alpha / r * B A   B, A trained from B_0, A_0

    At first W is W_target exactly: knowledge acts through the directions, and the scale, in which the adapter can move.
    Linear layers of the decoder's stack get an adapter, and the token embedding and the output layer unless they share
    one weight. Windows are chosen matrix by matrix, as in the authors' code, and need not fit each other. What is
    deployed is a plain model of the target's class.

    Data: samples of the task; a second stream `"seeds"`, if there is one, is what sensitivity is measured on. The
    control arm with a shuffled teacher begins with factors of the same singular values, turned at random.

    Args:
        rank: r, at least 1.
        alpha: its scale is alpha / rank; by default rank, so 1.
        window: `"sensitive"`, a contiguous window; `"rows_cols"`, the rows and columns of the largest mean sensitivity;
            `"random"`, a window drawn at random (to compare with).
        embeddings: whether the token embedding and the output layer get adapters.
        samples: how many samples sensitivity is measured on, drawn from the data where there is no stream `"seeds"`.
        dropout: of the adapters' inputs, in [0, 1).
        balanced: give the root of the singular values to either factor, rather than all to B.

    Raises:
        InputError: an argument is out of its range; source and target are not of one architecture; a moving average is
            asked for.
        ShapeError: the target has more layers than the source, or a larger matrix.
        VocabularyError: embeddings are of other vocabularies.
        MissingExtraError: PEFT is not installed.

    Source: Zhong, An, Chen, Han & He, "Seeking Neural Nuggets", ICLR 2024, arXiv:2310.11451.
    """

    card = Card(
        paper="Zhong et al., ICLR 2024",
        arxiv="2310.11451",
        sheet=28,
        carries="weights",
        teacher="weights",
        data="labelled",
        tasks=("language-model",),
    )
    family = "weights"

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        window: str = "sensitive",
        embeddings: bool = True,
        samples: int = 32,
        dropout: float = 0.05,
        balanced: bool = False,
    ):
        super().__init__()
        if rank < 1 or samples < 1:
            raise InputError(f"NeuralNuggets: rank is {rank} and samples {samples}, both must be at least 1")
        if alpha is not None and not alpha > 0:
            raise InputError(f"NeuralNuggets: alpha is {alpha}, it must be positive")
        if window not in WINDOWS:
            raise InputError(f"NeuralNuggets: unknown window {window!r}: {nearest(window, WINDOWS)}")
        if not 0 <= dropout < 1:
            raise InputError(f"NeuralNuggets: dropout is {dropout}, it must be at least 0 and below 1")
        self.rank, self.alpha, self.window, self.embeddings = rank, alpha, window, embeddings
        self.samples, self.dropout, self.balanced = samples, dropout, balanced
        self.additions = nn.ParameterDict()
        """A and B of every layer, the adapted model's own."""
        self.nuggets = Bag()
        """B_0 and A_0 by layer, which layers were kept, and how much of S the windows hold."""
        self._lora: tuple[Any, ...] = ()  # not a submodule: the target's weights are no state of this method

    # Before training -------------------------------------------------------------------------------------------

    def setup(self, run: Run, sample: Batch | None) -> None:
        if sample is None or "data" not in run.data:
            raise InputError("NeuralNuggets is tuned on one data set: pass it as data=..., or as 'data' beside 'seeds'")
        if run.training is not None and run.training.ema is not None:
            raise InputError(
                f"ema is {run.training.ema}: it averages weights of the target that stay as they are: leave it out"
            )
        source, target = eager(run["source"]), eager(run["target"])
        layers = self._layers(target, sample)
        self._require_fit(source, target, layers)
        alpha = self.rank if self.alpha is None else self.alpha
        lora = adapted(
            target, sample.inputs, self.rank, alpha, layers=layers, dropout=self.dropout, purpose="NeuralNuggets"
        )
        for path in layers:  # the base is shifted, and the target's own memory is not to be
            weight = lora.model.get_submodule(path).base_layer.weight
            weight.data = weight.data.clone()
        self._lora = (lora.model, tuple(layers))
        learned = {name: p for name, p in lora.model.named_parameters() if p.requires_grad}
        self.additions = nn.ParameterDict({name.replace(".", "/"): p for name, p in learned.items()})
        run.add("adapted", lora.model)
        sizes = [getattr(getattr(m, "config", None), "head_dim", None) for m in (source, target)]
        if sizes[0] != sizes[1]:
            run.watch.say(
                "nuggets across heads",
                f"the source's attention heads have {sizes[0]} dimensions, the target's {sizes[1]}: what is cut out of "
                "its attention is no head of the target's, and may mean little",
            )

    def _layers(self, target: nn.Module, sample: Batch) -> list[str]:
        """Paths of the layers that get an adapter."""
        stack = stack_of(target)
        layers = [path for path in layers_to_adapt(target, sample.inputs) if path.startswith(stack + ".")]
        if self.embeddings:
            paths = {id(m): name for name, m in target.named_modules()}
            tokens = next((m for m in target.modules() if isinstance(m, nn.Embedding)), None)
            head = find_output_layer(target, sample.inputs)
            if tokens is not None and head is not None and tokens.weight is not head.weight:
                layers += [paths[id(tokens)], paths[id(head)]]
        return layers

    def _require_fit(self, source: nn.Module, target: nn.Module, layers: list[str]) -> None:
        stack, depths = stack_of(target), (depth_of(source, stack_of(source)), depth_of(target, stack_of(target)))
        if stack_of(source) != stack:
            raise InputError(
                f"the source keeps its layers in {stack_of(source)!r}, the target in {stack!r}: NeuralNuggets needs a "
                "larger and a smaller model of one architecture"
            )
        if depths[0] < depths[1]:
            raise ShapeError(f"the source has {depths[0]} layers, the target {depths[1]}: take a deeper source")
        weights = dict(source.named_parameters(remove_duplicate=False))
        for path in layers:
            own: Any = target.get_submodule(path)
            name = source_name(path, stack, range(depths[1]))
            if name not in weights:
                raise InputError(f"the source has no {name!r}, as the target has: they must be of one architecture")
            theirs, mine = tuple(weights[name].shape), tuple(own.weight.shape)
            if len(theirs) != 2 or any(a < b for a, b in zip(theirs, mine, strict=True)):
                raise ShapeError(f"{name} is {theirs} in the source, {mine} in the target: the source must be larger")
            if not path.startswith(stack + ".") and theirs[0] != mine[0]:
                raise VocabularyError(
                    f"{name} knows {theirs[0]} tokens in the source, {mine[0]} in the target: pass embeddings=False "
                    "or models of one vocabulary"
                )

    def begin_stage(self, i: int, run: Run) -> bool:
        if i == 0:
            self._extract(run, self._measure(run))
        return i == 0

    def stage(self, i: int, run: Run) -> Stage:
        self._shift(run["target"])
        phase = Phase("adapters", self._loss, self.additions.values())
        return Stage({"data": run.data["data"]}, [phase], train=("adapted",))

    # 1. Sensitivity --------------------------------------------------------------------------------------------

    def _measure(self, run: Run) -> dict[str, Tensor]:
        """S by name of the source's parameters; every process reads all seeds, so all find the same."""
        params = dict(eager(run["source"]).named_parameters())
        totals = {name: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for name, p in params.items()}
        for one in self._seeds(run):
            leaf = leaves(params)
            loss = labels_term(run("source", one, params=leaf, own=True).learning, one).mean
            add_sensitivity(totals, loss, leaf)
        if broken := [name for name, value in totals.items() if not value.isfinite().all()]:
            raise DivergenceError(f"the sensitivity of {broken[0]} is not finite: is the source, or a seed sample?")
        return totals

    def _seeds(self, run: Run) -> Iterator[Batch]:
        """Samples that have a label, one at a time."""
        data = run.data.get("seeds", run.data["data"])
        if isinstance(data, Indexed):
            rows = torch.randperm(data.size, generator=run.shared_rng("seeds"))
            batches = (data.fetch(row[None]) for row in (rows if "seeds" in run.data else rows[: self.samples]))
        else:
            whole = data.sample(self.samples) or Batch()
            batches = (whole.slice(n, n + 1) for n in range(whole.size))
        for batch in batches:
            one = line_up(batch, run.task).to(run.device)
            if (one.labels != IGNORE).any():
                yield one

    # 2. to 4. Layers, windows, factors -------------------------------------------------------------------------

    def _extract(self, run: Run, total: dict[str, Tensor]) -> None:
        source, (model, layers) = eager(run["source"]), self._lora
        stack = stack_of(source)
        scores = layer_scores(total, stack)
        if not any(scores):
            raise InputError("no seed sample has a label that the source is sensitive to: mark the answers with labels")
        order = torch.tensor(scores).argsort(descending=True, stable=True)
        kept = order[: depth_of(model, stack)].sort().values
        self.nuggets["layers"], self.nuggets["scores"] = kept, torch.tensor(scores)
        weights = dict(source.named_parameters(remove_duplicate=False))
        owners = {id(p): name for name, p in source.named_parameters()}
        for path in layers:
            layer = model.get_submodule(path)
            weight = weights[source_name(path, stack, kept.tolist())]
            sensitivity = total[owners[id(weight)]]
            rows, columns = self._choose(sensitivity.cpu(), tuple(layer.base_layer.weight.shape), path, run)
            rows, columns = rows.to(weight.device), columns.to(weight.device)
            nugget = weight.detach().float()[rows][:, columns]
            b, a = self.begin(nugget.T if turned(layer) else nugget, path, run)
            share = sensitivity[rows][:, columns].sum() / sensitivity.sum().clamp(min=1e-30)
            self.nuggets[f"B {_flat(path)}"], self.nuggets[f"A {_flat(path)}"] = b, a.contiguous()
            self.nuggets[f"share {_flat(path)}"] = share
            with torch.no_grad():
                for parameter, value in zip(factors(layer)[:2], (b, a), strict=True):
                    parameter.copy_(value)

    def begin(self, nugget: Tensor, path: str, run: Run) -> tuple[Tensor, Tensor]:
        """B_0 and A_0 of a layer from what was cut out for it, `(out, in)`."""
        b, a = low_rank(nugget, self.rank, self.balanced)
        if run.shuffled:
            b, a = _rotated(b, run, path, "left"), _rotated(a.T, run, path, "right").T
        return b, a

    def _choose(self, scores: Tensor, shape: tuple[int, ...], path: str, run: Run) -> tuple[Tensor, Tensor]:
        if self.window == "rows_cols":
            return best_rows_columns(scores, (shape[0], shape[1]))
        if self.window == "random":
            draw = run.shared_rng("window", path)
            begins = [
                int(torch.randint(m - n + 1, (), generator=draw)) for m, n in zip(scores.shape, shape, strict=True)
            ]
            rows, columns = (torch.arange(begin, begin + n) for begin, n in zip(begins, shape, strict=True))
            return rows, columns
        return best_window(scores, (shape[0], shape[1]))

    # 5. to 7. Neutral injection, tuning, merging ---------------------------------------------------------------

    @torch.no_grad()
    def _shift(self, target: nn.Module) -> None:
        """Give the adapted model the base that its adapters start from; from saved state, so again after a resume."""
        model, layers = self._lora
        for path in layers:
            layer: Any = model.get_submodule(path)
            layer.base_layer.weight.copy_(self._base(layer, path, eager(target)))

    def _base(self, layer: Any, path: str, target: nn.Module) -> Tensor:
        """W_target - alpha / r * B_0 A_0, in float32."""
        own: Any = target.get_submodule(path)
        product = self.nuggets[f"B {_flat(path)}"] @ self.nuggets[f"A {_flat(path)}"]
        return own.weight.float() - factors(layer)[2] * (product.T if turned(layer) else product)

    def _loss(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        return {"labels": labels_term(run("adapted", batch).learning, batch)}

    @torch.no_grad()
    def deploy(self, target: nn.Module) -> nn.Module:
        merged = copy.deepcopy(target)
        if "layers" not in self.nuggets:  # nothing was cut out yet
            return merged
        model, layers = self._lora
        for path in layers:
            layer = model.get_submodule(path)
            own: Any = eager(merged).get_submodule(path)
            b, a, scale = factors(layer)
            product = b.float() @ a.float()
            own.weight.copy_(self._base(layer, path, eager(target)) + scale * (product.T if turned(layer) else product))
        return merged

    def panels(self) -> list[dict[str, Any]]:
        if "layers" not in self.nuggets:
            return []
        (_, layers), scores = self._lora, self.nuggets["scores"]
        kept = set(self.nuggets["layers"].tolist())
        spectra = {
            path: [(float(i + 1), float(s)) for i, s in enumerate(self.nuggets[f"B {_flat(path)}"].norm(dim=0))]
            for path in layers
        }
        return [
            {
                "kind": "bars",
                "title": "Sensitivity of the source's layers",
                "note": "Those that were kept are marked.",
                "rows": ["sensitivity"],
                "groups": [f"{i}{' (kept)' if i in kept else ''}" for i in range(len(scores))],
                "values": [[float(s) for s in scores]],
            },
            {
                "kind": "matrix",
                "title": "What the windows hold",
                "note": "Share of a source matrix' sensitivity that lies in the part that was cut out.",
                "rows": list(layers),
                "columns": ["share"],
                "values": [[float(self.nuggets[f"share {_flat(path)}"])] for path in layers],
            },
            {
                "kind": "lines",
                "title": "Singular values of the nuggets",
                "x": "number",
                "y": "norm of B's column at first",
                "series": spectra,
            },
        ]


def stack_of(model: nn.Module) -> str:
    """Path of the list that holds a model's layers: the numbered one with the most parameters.

    Raises:
        InputError: there is none.
    """
    sizes: dict[str, int] = {}
    for name, p in model.named_parameters():
        if found := re.match(r"(.*?)\.(\d+)\.", name):
            sizes[found[1]] = sizes.get(found[1], 0) + p.numel()
    if not sizes:
        raise InputError(f"{type(model).__name__} has no list of layers: NeuralNuggets needs a decoder")
    return max(sizes, key=lambda name: sizes[name])


def depth_of(model: nn.Module, stack: str) -> int:
    """How many layers it holds."""
    layers: Any = model.get_submodule(stack)
    return len(layers)


def source_name(path: str, stack: str, kept: Any) -> str:
    """The source's name of a target layer's weight: the j-th layer stands for the j-th that was kept."""
    if not path.startswith(stack + "."):
        return f"{path}.weight"
    number, _, rest = path.removeprefix(stack + ".").partition(".")
    return f"{stack}.{kept[int(number)]}.{rest}.weight"


def layer_scores(sensitivity: dict[str, Tensor], stack: str) -> list[float]:
    """The sum of S over all tensors of each layer."""
    scores: dict[int, float] = {}
    for name, value in sensitivity.items():
        if name.startswith(stack + "."):
            number = int(name.removeprefix(stack + ".").partition(".")[0])
            scores[number] = scores.get(number, 0.0) + float(value.double().sum())
    return [scores[i] for i in sorted(scores)]


def _rotated(matrix: Tensor, run: Run, *purpose: str) -> Tensor:
    """The rows' space turned at random, `(n, r)`: singular values and the other side stay."""
    noise = torch.randn(len(matrix), len(matrix), generator=run.shared_rng("rotation", *purpose))
    turn, upper = torch.linalg.qr(noise)
    return (turn * upper.diagonal().sign()).to(matrix.device) @ matrix


def _flat(name: str) -> str:
    return name.replace(".", "/")

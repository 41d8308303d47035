"""Master-ASR: languages share a network and a bank of scores, of which each selects some to mask the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Constant
from transfuse.core.errors import InputError
from transfuse.core.labels import labels_term
from transfuse.core.method import Bag, Method
from transfuse.core.outputs import eager
from transfuse.core.phases import Batches, Gradients, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.taps import resolve
from transfuse.losses import Term, ctc
from transfuse.weights.masks import PerTask, TaskBatches, key, shared, task_pools, top_fraction

NOISE, SPREAD = 0.1, 0.1


class _Select(torch.autograd.Function):
    """1 where sigmoid(t) > 0.5; the gradient is the sigmoid's. Where none is, the most probable one is selected."""

    @staticmethod
    def forward(ctx: Any, row: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        chosen = (row > 0).to(row)
        if not chosen.any():
            chosen[row.argmax()] = 1
        return chosen

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        probability = ctx.saved_tensors[0].sigmoid()
        return gradient * probability * (1 - probability)


class Artisan(PerTask):
    """A body whose chosen weights are masked for every language by the scores that it selects.

        b = 1[sigmoid(T_l) > 0.5],   S = sum_k b_k M_k,   W_l = W (*) 1[S among the ceil((1 - sparsity) size) largest]

    `model(inputs, task="de")`, or `model.of("de")`, a plain model with a fixed mask. Gradients go straight through both
    thresholds. A language has K numbers per layer and an output layer of its own.

    Args:
        body: the network.
        layers: paths of its masked layers. head: path of its output layer.
        experts: K. sparsity: share of the weights that a mask removes.
    """

    def __init__(self, body: nn.Module, layers: list[str], head: str, experts: int, sparsity: float):
        super().__init__(body, [])
        self.layers, self.head, self.experts, self.sparsity = layers, head, experts, sparsity
        self.scores, self.rows, self.heads = Bag(), Bag(), Bag()
        for path in layers:
            weight = body.get_parameter(f"{path}.weight")
            size = weight.detach().abs()
            noise = NOISE * size.mean() * torch.randn(experts, *weight.shape, device=weight.device)
            self.scores[path.replace(".", "|")] = nn.Parameter(size + noise)

    def append(self, language: str) -> None:
        """A new language: one row in every mapping, and an output layer that starts as the body's."""
        number = len(self.tasks)
        self.tasks.append(language)
        for path in self.layers:
            device = self.score(path).device
            self.rows[key(number, path)] = nn.Parameter(SPREAD * torch.randn(self.experts, device=device))
        for name, p in self.body.get_submodule(self.head).named_parameters():
            self.heads[key(number, f"{self.head}.{name}")] = nn.Parameter(p.detach().clone())

    def score(self, path: str) -> Tensor:
        """All M_k of a layer, `(K, *weight)`."""
        return self.scores[path.replace(".", "|")]

    def mask(self, task: int, path: str) -> Tensor:
        """A language's mask of a layer, in the shape of its weight."""
        selected: Tensor = _Select.apply(self.rows[key(task, path)])
        return top_fraction(torch.einsum("k,k...->...", selected, self.score(path)), self.sparsity)

    def overrides(self, task: int) -> dict[str, Tensor]:
        found = {f"{p}.weight": self.body.get_parameter(f"{p}.weight") * self.mask(task, p) for p in self.layers}
        for name, _ in self.body.get_submodule(self.head).named_parameters():
            found[f"{self.head}.{name}"] = self.heads[key(task, f"{self.head}.{name}")]
        return found

    def of_language(self, number: int, bag: Bag) -> list[nn.Parameter]:
        """A language's parameters in `rows` or `heads`."""
        return [p for name, p in bag.named_parameters() if name.startswith(f"{number}/")]


class MasterASR(Method):
    """Train one network for many languages, each with weight masks from a shared bank of scores; then add languages.

        W_l = W (*) top_(1 - sparsity)(sum_k 1[sigmoid(T_l,k) > 0.5] M_k)          in every chosen layer
        loss = -log p(transcript | audio) (CTC), batches of one language each

    With a plain target (a pre-trained encoder), all is learned: T with `alpha` times the learning rate, a constant one,
    and only every `beta` updates; W (with all that is not masked) and the scores M in turn, `gamma` updates each,
    W first; output layers in every update. What is deployed is an :class:`Artisan`. With that as the target, the
    languages in the data are new ones: only their rows of T and their output layers are learned, and languages that it
    knows stay bit-identical, unless `finetune` lets everything learn in the end (the paper's +ft). A language for which
    no score is selected gets the most probable one.

    Args:
        layers: taps of the masked layers: the projections of self-attention.
        head: path of the output layer. An Artisan brings its own `layers`, `head`, `experts` and `sparsity`.
        experts: K, scores per layer.
        sparsity: share of the weights that a mask removes, in [0, 1).
        alpha, beta, gamma: see above.
        finetune: last share of the training, in [0, 1), in which new languages change everything: weights, scores and,
            by them, how the known languages are read.
        loss: `"ctc"`, where labels are transcripts `(batch, tokens)` of ids above 0 (0 is the blank), padded with -100,
            and the model gives `(batch, frames, classes)`, of which the batch's `frames` count, or all; `"labels"`,
            cross-entropy.

    Raises:
        InputError: an argument is out of range; a language that the target knows already; a transcript that is empty or
            longer than its frames allow.

    Source: Yu et al., ICML 2023, arXiv:2306.15686. The start of the scores (|W| and a tenth of noise) and of T, which
    half of the turns begins, and the straight-through gradients are ours: the paper does not say.
    """

    card = Card(
        paper="Yu et al., ICML 2023",
        arxiv="2306.15686",
        sheet=160,
        carries="weights",
        teacher="none",
        data="few-labelled",
        tasks=("token-classification", "classification"),
    )
    family = "weights"
    uses_source = False
    brings_head = True

    def __init__(
        self,
        layers: str = "*.attn.*",
        head: str = "head",
        experts: int = 8,
        sparsity: float = 0.3,
        alpha: float = 10.0,
        beta: int = 5,
        gamma: int = 5000,
        finetune: float = 0.0,
        loss: str = "ctc",
    ):
        super().__init__()
        if experts < 1 or beta < 1 or gamma < 1:
            raise InputError(f"MasterASR: experts={experts}, beta={beta} and gamma={gamma} must be at least 1")
        if not 0 <= sparsity < 1 or not alpha > 0:
            raise InputError(f"MasterASR: sparsity is {sparsity}, in [0, 1), and alpha {alpha}, above 0")
        if not 0 <= finetune < 1:
            raise InputError(f"MasterASR: finetune is {finetune}, a share of the training in [0, 1)")
        if loss not in ("ctc", "labels"):
            raise InputError(f"MasterASR: loss is {loss!r}, it is 'ctc' or 'labels'")
        self.layers, self.head, self.experts, self.sparsity = layers, head, experts, sparsity
        self.alpha, self.beta, self.gamma, self.finetune, self.loss = alpha, beta, gamma, finetune, loss

    @property
    def taught_in_turns(self) -> bool:
        """Weights and scores rest by turns, and T in most updates."""
        return True

    def setup(self, run: Run, sample: Batch | None) -> None:
        self._tasks = task_pools("MasterASR", run.data)
        target = eager(run["target"])
        if isinstance(target, Artisan):
            self.model = copy.deepcopy(target)
            self._known = len(target.tasks)
            if again := [name for name in self._tasks if name in target.tasks]:
                raise InputError(f"the target knows {', '.join(again)} already: pass data of new languages only")
        else:
            self._known = 0
            body = copy.deepcopy(target)
            try:
                body.get_submodule(self.head)
            except AttributeError:
                raise InputError(f"the target has no layer {self.head!r}: say head=, its output layer") from None
            paths = [p for p in resolve(body, self.layers) if isinstance(body.get_submodule(p), nn.Linear)]
            if not paths:
                raise InputError(f"{self.layers!r} names no linear layer of the target: say layers=")
            self.model = Artisan(body, paths, self.head, self.experts, self.sparsity)
        for language in self._tasks:
            self.model.append(language)
        run.add("artisan", self.model)

    def begin_stage(self, i: int, run: Run) -> bool:
        return i == 0 or (i == 1 and self._known > 0 and self.finetune > 0)

    def stage(self, i: int, run: Run) -> Stage:
        model, streams = self.model, {"data": TaskBatches(self._tasks)}
        new = range(self._known, len(model.tasks))
        rows = [p for n in new for p in model.of_language(n, model.rows)]
        heads = [p for n in new for p in model.of_language(n, model.heads)]
        selection: dict[str, Any] = {"params": rows, "lr_scale": self.alpha, "weight_decay": 0.0}
        groups: list[dict[str, Any]]
        weights, scores = [*model.body.parameters()], [*model.scores.parameters()]
        if self._known:
            groups = [selection, {"params": heads}]
            if i == 1:
                groups += [{"params": weights}, {"params": scores, "weight_decay": 0.0}]
            share = self.finetune if i == 1 else 1 - self.finetune
            return Stage(streams, [Phase(("new", "all")[i], self.losses, groups)], share=share, train=("artisan",))
        groups = [{"params": weights}, {"params": scores, "weight_decay": 0.0}, {"params": heads}]
        return Stage(
            streams,
            [
                Phase("weights", self.losses, groups, edit=self._in_turn),
                Phase("selection", self._due, [selection], schedule=Constant()),
            ],
            train=("artisan",),
        )

    def losses(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        task = self._known + int(batch.domain[0])
        inputs = batch.inputs if isinstance(batch.inputs, Mapping) else {"inputs": batch.inputs}
        outputs = run("artisan", Batch(batch, inputs={**inputs, "task": task}))
        if self.loss == "labels":
            return {"labels": labels_term(outputs.logits, batch)}
        return {"ctc": Term.of(ctc(outputs.logits, batch.labels, batch.get("frames")))}

    def learns(self, i: int) -> Iterator[nn.Parameter]:
        for number in range(self._known, len(self.model.tasks)):
            yield from self.model.of_language(number, self.model.rows)
            yield from self.model.of_language(number, self.model.heads)

    def deploy(self, target: nn.Module) -> nn.Module:
        model = copy.deepcopy(self.model)
        model.default = self._known
        return model

    def panels(self) -> list[dict[str, Any]]:
        model = getattr(self, "model", None)
        if model is None:
            return []
        numbers = range(len(model.tasks))
        with torch.no_grad():
            masks = [torch.stack([model.mask(n, p) > 0 for n in numbers]) for p in model.layers]
            chosen = torch.stack(
                [torch.stack([model.rows[key(n, p)].sigmoid() for p in model.layers]) for n in numbers]
            )
        return [
            shared("Weights that languages share", "masks", model.tasks, masks),
            {
                "kind": "matrix",
                "title": "How likely each language selects each score",
                "note": f"Averaged over layers. Standard deviation over all: {float(chosen.std(correction=0)):.3f}.",
                "rows": model.tasks,
                "columns": [str(k) for k in range(model.experts)],
                "values": chosen.mean(1).cpu().tolist(),
            },
        ]

    def _in_turn(self, gradients: Gradients, run: Run) -> Gradients:
        """Leave out the gradients of what rests in this block of updates: the optimiser then skips it altogether."""
        first = run.clock.step // self.gamma % 2 == 0
        resting = {*(self.model.scores if first else self.model.body).parameters()}
        for p in resting:
            p.grad = None
        return {p: g for p, g in gradients.items() if p not in resting}

    def _due(self, batches: Batches, run: Run) -> Losses:
        return {} if run.clock.step % self.beta else self.losses(batches, run)

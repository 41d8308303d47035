"""EfficientScale, scale-up: a small language model's weights begin a larger one."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.labels import labels_term
from transfuse.core.method import Method
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.weights.growth import Growth, exact_eps, grown, load

EPS = ("eps", "variance_epsilon", "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")


class ScaleUp(Method):
    """Grow a trained language model in width and depth, and go on training it on text.

        wider by FPI:   W'[i, j] = W[g_out(i), g_in(j)] / C(g_in(j)),   C(j) = how many new units copy unit j
        wider by AKI:   the same for old units i; rows of new ones are those of the next layer's W'
        deeper:         layer l is the source's floor(l * L / L'), or l mod L

    `target` gives the architecture, of the source's class; what weights it has does not matter. One g holds for the
    whole residual stream; attention grows by whole heads. With grouped queries their number of groups must stay, and
    new query heads read the keys and values of their own group. FPI computes what the source did, without norms for
    any width, with norms for whole multiples (or `norm_exact`); but copies get equal gradients for ever, which AKI
    breaks and is not function-preserving. `operator="aki", depth="interpolation"` is the paper's AKI-Pro.

    The loss of source and target on the first batch, and when the target is as good, are in the report.

    Args:
        operator: `"aki"` or `"fpi"`.
        depth: `"interpolation"` or `"stacking"`.
        mapping: g: `"circular"` from left to right, or `"random"` for units beyond the first.
        scope: what AKI gives new rows: `"inner"`, heads and units of the perceptron; `"all"`, what writes into the
            stream as well.
        consumer: where columns that read new heads and units come from: their `"own"` layer, or the `"next"`.
        identity: copies of layers write nothing in the beginning, which keeps the function.
        norm_exact: fill channels beyond a whole multiple so that norms say the same (their epsilon is scaled too).

    Raises:
        InputError: an argument is unknown; no source; source and target do not fit.
        ShapeError: a parameter cannot grow into the target's.

    Source: Zhang et al., AquilaMoE, 2024, arXiv:2408.06567; Chen et al., bert2BERT, ACL 2022, arXiv:2110.07143;
        Wang et al., LEMON, ICLR 2024, arXiv:2310.07999 (`norm_exact`).
    """

    family = "weights"
    card = Card(
        paper="Zhang et al., 2024",
        arxiv="2408.06567",
        sheet=158,
        carries="weights",
        teacher="weights",
        data="unlabelled",
        tasks=("language-model",),
    )

    continuity: Tensor
    """Loss of the source, of the target when it has grown, updates and tokens until it was as good; -1: not yet."""

    def __init__(
        self,
        operator: str = "aki",
        depth: str = "interpolation",
        mapping: str = "circular",
        scope: str = "inner",
        consumer: str = "own",
        identity: bool = False,
        norm_exact: bool = False,
    ):
        super().__init__()
        self.operator, self.depth, self.mapping, self.scope = operator, depth, mapping, scope
        self.consumer, self.identity, self.norm_exact = consumer, identity, norm_exact
        for name, kind in get_type_hints(Growth).items():
            if get_args(kind) and getattr(self, name) not in get_args(kind):
                known = " or ".join(map(repr, get_args(kind)))
                raise InputError(f"ScaleUp: {name} is {getattr(self, name)!r}, it must be {known}")
        self.register_buffer("continuity", torch.full((4,), -1.0))

    @property
    def growth(self) -> Growth:
        """The arguments as :func:`~transfuse.weights.growth.grown` takes them."""
        return Growth(**{name: getattr(self, name) for name in get_type_hints(Growth)})

    def setup(self, run: Run, sample: Batch | None) -> None:
        if sample is None:
            raise InputError("ScaleUp goes on training on text: pass data=...")
        if run.shuffled:
            raise InputError("ScaleUp reads weights, so there is no shuffled arm")
        if "source" not in run:
            raise InputError(f"ScaleUp needs one source model, found {len(run.sources)}: pass source=model")
        if run.training is not None and run.training.ema is not None:
            raise InputError("ema averages from before the growth: leave it out")
        grown(run["source"], run["target"], self.growth, torch.Generator().manual_seed(0))  # errors come early
        if self.norm_exact:
            _scale_eps(run["target"], exact_eps(run["source"], run["target"]))
        self._sample = sample

    def begin_stage(self, i: int, run: Run) -> bool:
        if i:
            return False
        load(run["target"], grown(run["source"], run["target"], self.growth, run.shared_rng("growth")))
        for k, role in enumerate(("source", "target")):
            outputs = run(role, self._sample, grad=False)
            self.continuity[k] = labels_term(outputs.learning, self._sample).mean
        return True

    def stage(self, i: int, run: Run) -> Stage:
        if "data" not in run.data:
            raise InputError("ScaleUp learns from one data set: pass it as data=...")
        return Stage({"data": run.data["data"]}, [Phase("labels", self.loss, run["target"].parameters())])

    def loss(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        return {"labels": labels_term(run("target", batch).learning, batch)}

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        if self.continuity[2] < 0 and values["labels"] <= self.continuity[0]:
            assert self._sample.mask is not None
            self.continuity[2] = run.clock.step + 1
            self.continuity[3] = (run.clock.step + 1) * self._sample.mask.sum()

    def panels(self) -> list[dict[str, Any]]:
        source, target, updates, tokens = self.continuity.tolist()
        when = f"after {updates:.0f} updates, about {tokens:.0f} tokens" if updates >= 0 else "not within this training"
        return [
            {
                "kind": "bars",
                "title": "Loss before and after growth",
                "note": f"On the first batch. A batch with the source's loss was seen {when}.",
                "rows": ["loss"],
                "groups": ["source", "grown target"],
                "values": [[source, target]],
            }
        ]


def _scale_eps(model: nn.Module, factor: float) -> None:
    config = getattr(model, "config", None)
    for owner in (*model.modules(), *([config] if config is not None else [])):
        for name in EPS:
            if isinstance(value := getattr(owner, name, None), float):
                setattr(owner, name, value * factor)

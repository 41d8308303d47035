"""GraftLLM: a fine-tuned language model as a small pack of its change, to be put on the base and taken off."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch, line_up, padding_mask
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.method import Bag, Method
from transfuse.core.output_layer import find_output_layer
from transfuse.core.run import Run
from transfuse.core.streams import Draw
from transfuse.weights.factors import Factors
from transfuse.weights.layout import transposed
from transfuse.weights.skillpack import Plan, SkillPack, compressed, fingerprint, planned
from transfuse.weights.task_vectors import TaskVectors

BATCH = 32
Other = Literal["prune", "keep", "drop"]


class GraftLLM(Method):
    """Compress what fine-tuning has changed into a skill pack: low-rank factors in mixed precision, rounded by GPTQ.

        D = W_tuned - W_base = U diag(s) V^T, truncated           for every projection in attention and perceptrons
        W = W_base + sum over groups g of Q(U_g) diag(s_g) Q(V_g)^T

    The first singular values are kept in 8 bits, the next in 4, the rest in 2. Layers are compressed in the order in
    which they run: each is calibrated on the inputs that it gets from the compressed ones before it. V_g is rounded for
    the layer's inputs x, U_g for diag(s_g) V_g^T x. Of all other parameters the largest changes are kept.

    The source is the tuned model, the target the base that it was tuned from (by any method, such as SeqKD and DPKD on
    a stronger model's answers), `data` text of the new skill to calibrate on. Nothing is trained. What is deployed is
    the base with the pack on it; `model.skill_pack` is the :class:`~transfuse.weights.skillpack.SkillPack`, to be
    saved, put on and taken off (:class:`~transfuse.weights.skillpack.Grafts`), or routed to
    (:class:`~transfuse.weights.skillpack.Routed`).

    Args:
        attention_rank, mlp_rank: singular values that are kept, as shares of min(in, out) (1000 and 1400 of 4096).
        groups: shares of the kept singular values with their bits, the largest values first; bits are 2, 3, 4, 8, 16
            (half precision) or 32.
        other: what becomes of other parameters: `"prune"` keeps the share `alpha` of the largest changes in each,
            `"keep"` all of them in half precision, `"drop"` none.
        alpha: for `"prune"`.
        attention, mlp: patterns of the paths of linear layers.
        symmetric, group, act_order, damp: of the rounding, see :func:`~transfuse.weights.gptq.gptq`.
        calibration: samples of the data that are used.

    Raises:
        InputError: an argument is out of its range; there is no data, not one source, or the source was not tuned from
            this base or holds NaN; a pattern fits no linear layer.
        ShapeError: a tensor of the source differs in shape from the base's.

    Source: Du et al., ICLR 2026, arXiv:2505.18502.
    """

    card = Card(
        paper="Du et al., ICLR 2026",
        arxiv="2505.18502",
        sheet=53,
        carries="weights",
        teacher="weights",
        data="unlabelled",
        tasks=("language-model", "classification"),
    )
    family = "weights"
    trains = False

    def __init__(
        self,
        attention_rank: float = 0.24,
        mlp_rank: float = 0.34,
        groups: Plan = ((0.02, 8), (0.18, 4), (0.8, 2)),
        other: Other = "prune",
        alpha: float = 0.1,
        attention: Sequence[str] = ("*attn*", "*attention*"),
        mlp: Sequence[str] = ("*mlp*",),
        symmetric: bool = False,
        group: int = 128,
        act_order: bool = True,
        damp: float = 0.01,
        calibration: int = 128,
    ):
        super().__init__()
        if not 0 < attention_rank <= 1 or not 0 < mlp_rank <= 1 or not 0 < alpha <= 1:
            raise InputError(
                f"GraftLLM: attention_rank is {attention_rank}, mlp_rank {mlp_rank} and alpha {alpha}: each must be "
                "above 0 and at most 1; ranks are shares of min(in, out)"
            )
        if other not in ("prune", "keep", "drop"):
            raise InputError(f"GraftLLM: other is {other!r}, known are 'prune', 'keep' and 'drop'")
        if group < 1 or calibration < 1 or not damp > 0:
            raise InputError(f"GraftLLM: group is {group}, calibration {calibration}, damp {damp}: above 0 each")
        planned(1000, groups)
        self.attention_rank, self.mlp_rank, self.groups, self.other = attention_rank, mlp_rank, groups, other
        self.alpha, self.attention, self.mlp, self.symmetric = alpha, attention, mlp, symmetric
        self.group, self.act_order, self.damp, self.calibration = group, act_order, damp, calibration
        self.stored = Bag()
        """The pack's tensors, and the fingerprint of the base."""

    def setup(self, run: Run, sample: Batch | None) -> None:
        if run.shuffled:
            raise InputError("GraftLLM reads weights, not outputs, so there is no shuffled arm")
        if len(run.sources) != 1:
            raise InputError(f"GraftLLM compresses one tuned model, found {len(run.sources)}: pass source=model")
        if sample is None:
            raise InputError("GraftLLM rounds weights for the inputs of layers: pass data=... to calibrate on")
        target = run["target"]
        self._vectors = (TaskVectors(target, {"source": run[run.sources[0]]}),)
        self._shares = self._projections(target, sample)
        run.tap("target", [f"{path}:input" for path in self._shares])

    def begin_stage(self, i: int, run: Run) -> bool:
        if i == 0:
            self._compress(run)
        return False  # there is nothing to train

    @property
    def pack(self) -> SkillPack:
        """What has been stored."""
        tensors = {k: v for k, v in self.stored.named_buffers() if k != "base"}
        base = "".join(map(chr, self.stored["base"].tolist()))
        return SkillPack(tensors, base, {"method": repr(self)})

    @torch.no_grad()
    def deploy(self, target: nn.Module) -> nn.Module:
        grafted, pack = copy.deepcopy(target), self.pack
        own = dict(grafted.named_parameters())
        for block in pack.blocks:
            own[block].copy_(own[block].float() + pack.change(block, own[block]))
        grafted.skill_pack = pack  # type: ignore[assignment]
        return grafted

    def panels(self) -> list[dict[str, Any]]:
        if "base" not in self.stored:
            return []
        pack, vectors = self.pack, self._vectors[0]
        rows, values = [], []
        for block in pack.blocks:
            change, size = vectors.difference(0, block), vectors.base[block].numel()
            own = SkillPack({k: t for k, t in pack.tensors.items() if k.startswith(_key(block) + "|")}, "")
            error = (own.change(block, change) - change).norm() / change.norm().clamp(min=1e-12)
            rows.append(block)
            values.append([own.bits / size, float(error)])
        whole = sum(p.numel() for p in vectors.base.values())
        return [
            {
                "kind": "matrix",
                "title": "What the skill pack stores",
                "note": f"{pack.bits / whole:.2f} bits per parameter in all; a change in half precision has 16.",
                "rows": rows,
                "columns": ["bits per parameter", "relative error of the change"],
                "values": values,
            }
        ]

    def _projections(self, target: nn.Module, sample: Batch) -> dict[str, float]:
        """Paths of the layers to compress, in the order in which they run, with the share of values they keep."""
        head = find_output_layer(target, sample.inputs)
        modules = dict(target.named_modules())
        linear = [n for n, m in modules.items() if (type(m) is nn.Linear or transposed(m)) and m is not head]
        found: dict[str, float] = {}
        for kind, patterns, share in (
            ("attention", self.attention, self.attention_rank),
            ("mlp", self.mlp, self.mlp_rank),
        ):
            fits = [n for n in linear if any(fnmatchcase(n, p) for p in patterns) and n not in found]
            if not fits:
                raise InputError(
                    f"GraftLLM: no linear layer fits {kind}={list(patterns)}; there are {', '.join(linear) or 'none'}"
                )
            found |= dict.fromkeys(fits, share)
        return {path: found[path] for path in linear if path in found}

    @torch.no_grad()
    def _compress(self, run: Run) -> None:
        """Others first, then layer after layer, each on the inputs from those that are compressed already."""
        vectors, own = self._vectors[0], dict(run["target"].named_parameters())
        weights = {f"{path}.weight": path for path in self._shares}
        for block in vectors.blocks:
            if block not in weights:
                for name, tensor in self._other(vectors.difference(0, block)).items():
                    self.stored[f"{_key(block)}|{name}"] = tensor
        base = fingerprint(run["target"])
        self.stored["base"] = torch.tensor([ord(c) for c in base], dtype=torch.uint8)
        pack = self.pack
        composed = {b: own[b] + pack.change(b, own[b]).to(own[b].dtype) for b in pack.blocks}
        batches = list(self._calibration(run))
        options = {"group": self.group, "symmetric": self.symmetric, "damp": self.damp, "act_order": self.act_order}
        for block, path in weights.items():
            change = vectors.difference(0, block)
            if transposed(run["target"].get_submodule(path)):
                change = change.T
                self.stored[f"{_key(block)}|turned"] = torch.ones(1, dtype=torch.uint8)
            factors = Factors.of(change).top(max(1, round(self._shares[path] * min(change.shape))))
            gram = self._gram(path, batches, composed, run)
            for name, tensor in compressed(factors, gram, self.groups, **options).items():
                self.stored[f"{_key(block)}|{name}"] = tensor
            composed[block] = own[block] + self.pack.change(block, own[block]).to(own[block].dtype)

    def _other(self, change: Tensor) -> dict[str, Tensor]:
        if self.other == "drop":
            return {}
        if self.other == "keep":
            return {"values": change.half()}
        flat = change.flatten()
        index = flat.abs().topk(max(1, round(self.alpha * flat.numel()))).indices.sort().values
        return {"index": index.int(), "values": flat[index].half()}

    def _gram(self, path: str, batches: Sequence[Batch], composed: Mapping[str, Tensor], run: Run) -> Tensor:
        """Sum over real tokens of x x^T of one layer's inputs."""
        total: Tensor | float = 0.0
        for batch in batches:
            tap = f"{path}:input"
            x = run("target", batch, grad=False, params=composed, until=tap).features[tap]
            mask = padding_mask(batch)
            x = x.flatten(0, -2) if mask is None or mask.shape != x.shape[:2] else x[mask]
            total = total + x.float().mT @ x.float()
        assert isinstance(total, Tensor)
        return total

    def _calibration(self, run: Run) -> Iterator[Batch]:
        left = self.calibration
        stream = next(iter(run.data.values()))
        for micro in stream.epoch(Draw(BATCH, None, shuffle=True, seed=run.seed), 0):
            for batch in micro:
                if left > 0:
                    yield line_up(batch.slice(0, left), run.task).to(run.device)
                    left -= batch.size
            if left <= 0:
                return


def _key(block: str) -> str:
    return block.replace(".", "/")  # a dot would be a submodule's

"""EfficientScale, scale-out: a dense language model becomes a mixture of experts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch, real_tokens
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.labels import labels_term
from transfuse.core.method import Method
from transfuse.core.phases import Batches, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.losses import Term, balance_loss, router_z_loss
from transfuse.weights.experts import upcycled


class ScaleOut(Method):
    """Copy every perceptron of a trained language model into several experts, and go on training them with a router.

        y = sum over the top_k experts e of softmax(router(x))_e over the chosen * expert_e(x)
        loss = CE + balance * E sum_e f_e P_e + z * mean logsumexp(router(x))^2

    Weights of the chosen sum to 1, so that at first the mixture is the dense model, whatever the router says. f_e is
    the share of routed slots that expert e gets, P_e its mean probability; both losses are means over the layers. The
    router must be random: equal scores would give every token to the same experts, which then never differ.

    The target is the dense model; no source takes part. What comes back is a copy of it with
    :class:`~transfuse.weights.experts.Experts` as its perceptrons.

    Args:
        experts: E. top_k: how many of them a token is given to.
        balance, z: weights of the losses on the router.
        std: of the router's first weights; the paper prints a variance of 0.02, many codes use 0.02.

    Raises:
        InputError: an argument is out of its range; the target's perceptrons are not found.

    Source: Zhang et al., AquilaMoE, 2024, arXiv:2408.06567; Komatsuzaki et al., ICLR 2023, arXiv:2212.05055.
    """

    family = "weights"
    card = Card(
        paper="Zhang et al., 2024",
        arxiv="2408.06567",
        sheet=158,
        carries="weights",
        teacher="none",
        data="unlabelled",
        tasks=("language-model",),
    )
    uses_source = False
    units = {"real": lambda batch: real_tokens(batch).sum()}  # noqa: RUF012
    usage: Tensor
    """Share of the routed slots of the last update, `(layers, experts)`."""

    def __init__(
        self, experts: int = 8, top_k: int = 2, balance: float = 1e-3, z: float = 1e-2, std: float = 0.02**0.5
    ):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise InputError(f"ScaleOut: top_k is {top_k}, it must lie between 1 and experts={experts}")
        if balance < 0 or z < 0 or not std > 0:
            raise InputError(f"ScaleOut: balance {balance} and z {z} must not be negative, std {std} must be positive")
        self.experts, self.top_k, self.balance, self.z, self.std = experts, top_k, balance, z, std
        self._routers: list[str] = []
        self._slots: list[Tensor] = []

    def setup(self, run: Run, sample: Batch | None) -> None:
        if sample is None:
            raise InputError("ScaleOut goes on training on text: pass data=...")
        if run.training is not None and run.training.ema is not None:
            raise InputError("ema averages weights of the dense target, which stay as they are: leave it out")
        self.mixture, paths = upcycled(run["target"], self.experts, self.top_k, self.std)
        self.register_buffer("usage", torch.zeros(len(paths), self.experts))
        self._routers = [f"{path}.router" for path in paths]
        run.add("mixture", self.mixture)
        run.tap("mixture", self._routers)
        self.to(run.device)

    def stage(self, i: int, run: Run) -> Stage:
        if "data" not in run.data:
            raise InputError("ScaleOut learns from one data set: pass it as data=...")
        return Stage({"data": run.data["data"]}, [Phase("mixture", self.loss, self.parameters())], train=("mixture",))

    def loss(self, batches: Batches, run: Run) -> Losses:
        batch = batches["data"]
        outputs, real = run("mixture", batch), real_tokens(batch)
        scores = [outputs.features[name] for name in self._routers]
        self._slots = [s.detach()[real].topk(self.top_k, -1).indices.flatten() for s in scores]
        balance = torch.stack([balance_loss(s[real], self.top_k) for s in scores]).mean()
        z = torch.stack([router_z_loss(s) for s in scores]).mean(0)
        return {
            "labels": labels_term(outputs.learning, batch),
            "balance": self.balance * Term(balance),
            "z": self.z * Term.of(z, real, "real"),
        }

    def after_update(self, phase: Phase, values: dict[str, Tensor], run: Run) -> None:
        counts = torch.stack([torch.bincount(slots, minlength=self.experts) for slots in self._slots])
        self.usage.copy_(counts / counts.sum(1, keepdim=True))

    def deploy(self, target: nn.Module) -> nn.Module:
        return copy.deepcopy(self.mixture)

    def panels(self) -> list[dict[str, Any]]:
        return [
            {
                "kind": "matrix",
                "title": "Share of the tokens of each expert",
                "note": "Of the routed slots of the last update; equal use is one over the number of experts.",
                "rows": self._routers,
                "columns": [f"expert {e}" for e in range(self.experts)],
                "values": self.usage.tolist(),
            }
        ]

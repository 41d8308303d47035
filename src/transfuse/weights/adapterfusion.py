"""AdapterFusion: attention over the adapters of several tasks, learned on a new one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch, padding_mask
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.outputs import call
from transfuse.core.phases import Batches, Losses
from transfuse.core.run import Run
from transfuse.losses import Term
from transfuse.weights.adapters import Combining, adapted_layers


class Fusion(nn.Module):
    """Attention of every token over the adapters' outputs: `a = softmax_n((Q h + b_q) . (K z_n + b_k))`.

    No scaling and no heads. Q and K start as N(0, 0.02) with zero biases; V as the identity with 1e-6 off its diagonal,
    so that at first adapters are averaged softly and pass through unchanged.

    Args:
        dim: width of `h` and `z`.
        dynamic: whether there is a V.
    """

    def __init__(self, dim: int, dynamic: bool = True):
        super().__init__()
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.value = nn.Linear(dim, dim, bias=False) if dynamic else None
        if self.value is not None:
            nn.init.constant_(self.value.weight, 1e-6)
            with torch.no_grad():
                self.value.weight.fill_diagonal_(1.0)

    def attention(self, h: Tensor, z: Tensor) -> Tensor:
        """How much each token takes of each adapter: `(..., dim)` and `(adapters, ..., dim)` give `(adapters, ...)`."""
        return (self.query(h) * self.key(z)).sum(-1).softmax(0)

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        taken = (self.attention(h, z).unsqueeze(-1) * z).sum(0)
        return taken if self.value is None else self.value(taken)  # V is linear: the same as of each z, N times cheaper

    def penalty(self) -> Tensor:
        """`||I - V||^2` (Frobenius)."""
        if self.value is None:
            return self.query.weight.new_zeros(())
        weight = self.value.weight
        return (torch.eye(len(weight), device=weight.device) - weight).pow(2).sum()


class AdapterFusion(Combining):
    """Learn, per layer and token, how much to take of each source task's adapter; backbone and adapters stay frozen.

        q = Q h + b_q,  k_n = K z_n + b_k,  v_n = V z_n,   z_n adapter n's output without its residual
        a = softmax_n(q . k_n),   out = h + sum_n a_n v_n
        loss = CE(labels) + decay * sum over layers ||I - V||_F^2

    The target task's own adapter is normally among the sources. Q, K and V (dim x dim) are new in every layer, and so
    is the head. All adapters run for every token, and nothing can be merged: the deployed model is the target with
    these modules in it. The penalty is part of the loss; in the authors' library its gradient enters one update later.

    Args:
        dynamic: whether there is a V; without one the adapters' outputs are averaged as they are.
        decay: weight of the penalty that keeps V near the identity.

    Raises:
        InputError: `decay` is negative; a source has no adapters, or another backbone, layer or width than the rest.

    Source: Pfeiffer, Kamath, Rückle, Cho & Gurevych, EACL 2021, arXiv:2005.00247.
    """

    card = Card(
        paper="Pfeiffer et al., EACL 2021",
        arxiv="2005.00247",
        sheet=67,
        carries="weights",
        teacher="weights",
        data="few-labelled",
    )

    def __init__(self, dynamic: bool = True, decay: float = 0.01):
        super().__init__()
        if not decay >= 0:
            raise InputError(f"AdapterFusion: decay is {decay}, it must not be negative")
        self.dynamic, self.decay = dynamic, decay
        self.register_buffer("taken", torch.zeros(0, 0))

    def combination(self, count: int, dim: int) -> nn.Module:
        return Fusion(dim, self.dynamic)

    def setup(self, run: Run, sample: Batch | None) -> None:
        super().setup(run, sample)
        self.taken = torch.zeros(len(self._paths), len(self._sources), device=run.device)

    def losses(self, batches: Batches, run: Run) -> Losses:
        found = super().losses(batches, run)
        if self.dynamic:
            fusions = [adapted.combine for adapted in adapted_layers(self._model[0]).values()]
            penalty = torch.stack([fusion.penalty() for fusion in fusions]).sum()
            found["identity"] = self.decay * Term(penalty)
        return found

    def end_stage(self, i: int, run: Run) -> None:
        sample = run.data["data"].sample(256)
        assert sample is not None
        with run.probe():
            run.set_modes(set())
            self.taken = attention_of(self._model[0], sample.to(run.device).inputs)

    def panels(self) -> list[dict[str, Any]]:
        if not self.taken.numel():
            return []
        return [
            {
                "kind": "matrix",
                "title": "What each layer takes of each source",
                "note": "Attention, averaged over tokens of training data. The rows sum to 1.",
                "rows": self._paths,
                "columns": self._sources,
                "values": self.taken.cpu().tolist(),
            }
        ]


@torch.no_grad()
def attention_of(model: nn.Module, inputs: Any) -> Tensor:
    """The attention over adapters in a fused model, averaged over tokens that are no padding, `(layers, adapters)`."""
    mask = padding_mask(Batch(inputs=inputs))
    with _listening(model) as found:
        call(model, inputs)
    rows = []
    for attention in found:
        real = mask if mask is not None and mask.shape == attention.shape[1:] else ...
        rows.append(attention[:, real].flatten(1).mean(1))
    return torch.stack(rows)


@contextmanager
def _listening(model: nn.Module) -> Iterator[list[Tensor]]:
    """The attention of every layer in the order in which they run, while the block lasts."""
    found: list[Tensor] = []
    fusions = [m for m in model.modules() if isinstance(m, Fusion)]
    handles = [m.register_forward_hook(lambda own, args, _: found.append(own.attention(*args))) for m in fusions]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()

"""ScaLearn: adapters of several tasks, scaled by a few learned numbers and added up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.run import Run
from transfuse.weights.adapters import Combining, adapted_layers, concatenated


class Scaling(nn.Module):
    """`sum_s w_s (*) z_s` over adapters' outputs `(adapters, ..., dim)`.

    Args:
        weight: `(adapters, dim)`, or `(adapters, 1)`; layers may share it.
        dim: width of the outputs.
        dropout: of the coefficients while training, the rest scaled up by 1 / (1 - dropout).
        softmax: bring them to a sum of 1 over adapters first.
    """

    def __init__(self, weight: nn.Parameter, dim: int, dropout: float = 0.0, softmax: bool = False):
        super().__init__()
        self.weight, self.dim, self.dropout, self.softmax = weight, dim, dropout, softmax

    @property
    def coefficients(self) -> Tensor:
        """w, `(adapters, dim)`."""
        return self._scales().expand(-1, self.dim)

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        weight = F.dropout(self._scales(), self.dropout, self.training)
        return (weight.view(len(weight), *(1,) * (z.dim() - 2), -1) * z).sum(0)

    def _scales(self) -> Tensor:
        return self.weight.softmax(0) if self.softmax else self.weight


class ScaLearn(Combining):
    """Learn how much of each source task's adapter to add, as numbers that nothing normalises.

        out = h + sum_s w_s (*) z_s,    z_s adapter s's output without its residual

    One of four variants, by what w_s is: ScaLearn, a vector per layer and source; `uniform` (ScaLearnUniform), one
    number per layer and source; `shared` (ScaLearn++), a vector per source that all layers share; both
    (ScaLearnUniform++), one number per source. Coefficients start at N(total / sources, 0.001), may be negative and
    need not sum to anything. Backbone and adapters stay frozen; the head is trained with them. The deployed model has,
    in each layer, one wide adapter that is exactly the scaled sum, and can itself be a source.

    Args:
        uniform: numbers instead of vectors.
        shared: one tensor for all layers.
        dropout: of the coefficients themselves, in [0, 1).
        total: what they sum to at first.
        softmax: normalise them over sources: the ablation that turns scaling into averaging.
        lr_scale: factor of the caller's learning rate, which the head has: 6e-3 where that is 1e-3. 0 leaves them where
            they start, so that with `total=1` adapters are averaged. They do not decay: that
            would pull to the backbone.

    Raises:
        InputError: an argument is out of its range; a source has no adapters, or another backbone, layer or width than
            the rest.

    Source: Frohmann, Holtermann, Masoudian, Lauscher & Rekabsaz, Findings of ACL 2024, arXiv:2310.01217.
    """

    card = Card(
        paper="Frohmann et al., Findings of ACL 2024",
        arxiv="2310.01217",
        sheet=86,
        carries="weights",
        teacher="weights",
        data="few-labelled",
    )

    def __init__(
        self,
        uniform: bool = False,
        shared: bool = False,
        dropout: float = 0.3,
        total: float = 2.0,
        softmax: bool = False,
        lr_scale: float = 6.0,
    ):
        super().__init__()
        if not 0 <= dropout < 1:
            raise InputError(f"ScaLearn: dropout is {dropout}, it must be in [0, 1)")
        if not lr_scale >= 0:
            raise InputError(f"ScaLearn: lr_scale is {lr_scale}, it must not be negative")
        self.uniform, self.shared, self.dropout = uniform, shared, dropout
        self.total, self.softmax, self.lr_scale = total, softmax, lr_scale
        self._common: tuple[nn.Parameter, ...] = ()

    def setup(self, run: Run, sample: Batch | None) -> None:
        self._common = ()
        super().setup(run, sample)
        if len(self._sources) == 1 and self.dropout:
            run.watch.say(
                "dropout of one source",
                "with one source, dropout of coefficients switches whole features of the adapter off: use dropout=0",
            )

    def combination(self, count: int, dim: int) -> nn.Module:
        if self.shared and self._common:
            weight = self._common[0]
            if not self.uniform and weight.shape[1] != dim:
                raise InputError(f"shared vectors need layers of one width, found {weight.shape[1]} and {dim}")
        else:
            start = 0.0 if self.softmax else self.total / count
            weight = nn.Parameter(start + 0.001 * torch.randn(count, 1 if self.uniform else dim))
            self._common = (weight,)
        return Scaling(weight, dim, self.dropout, self.softmax)

    def groups(self) -> list[dict[str, Any]]:
        scales = {"params": [*self.inserted.values()], "lr_scale": self.lr_scale, "weight_decay": 0.0}
        return [*([scales] if self.lr_scale else []), {"params": [*self.head.values()]}]

    def deploy(self, target: nn.Module) -> nn.Module:
        return concatenated(super().deploy(target))

    def coefficients(self) -> Tensor:
        """What was learned, `(layers, sources, dim)`; numbers are repeated along the last axis."""
        scalings = [adapted.combine for adapted in adapted_layers(self._model[0]).values()]
        return torch.stack([scaling.coefficients.detach() for scaling in scalings])

    def panels(self) -> list[dict[str, Any]]:
        if not self._model:
            return []
        mean = self.coefficients().mean(2)
        return [
            {
                "kind": "matrix",
                "title": "How each layer scales each source",
                "note": f"Coefficients, averaged over features. They sum to {self.total:g} at first.",
                "rows": self._paths,
                "columns": [*self._sources, "sum"],
                "values": torch.cat([mean, mean.sum(1, keepdim=True)], 1).cpu().tolist(),
            }
        ]

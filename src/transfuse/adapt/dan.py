"""DAN: features whose distributions agree in every mean that a family of kernels can see."""

from __future__ import annotations

from collections.abc import Sequence

from transfuse.adapt.base import Adaptation
from transfuse.adapt.discriminator import flat
from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.clock import Clock
from transfuse.core.errors import InputError
from transfuse.core.outputs import Outputs
from transfuse.core.phases import Losses
from transfuse.losses import Term, mmd


class DAN(Adaptation):
    """Match source and target features of one or several layers under a multi-kernel maximum mean discrepancy.

        loss = CE(source labels) + sum over layers of MMD**2(f_s, f_t)

    The kernel is the mean of `kernels` Gaussians, each of twice the bandwidth of the one before, around the mean
    squared distance of the batch; MMD**2 is taken over all pairs of a batch, with the pairs of a row with itself, so
    it is never negative (:func:`transfuse.losses.mmd`). The paper learns the kernels' weights by a quadratic
    programme and estimates in linear time; here the weights are equal, and all pairs are used.
    Its trade-off is the weight of the method: `0.5 * DAN()`.

    Args:
        layers: taps whose features are matched; the paper takes all fully connected layers, logits included.
        kernels: number of bandwidths.

    Raises:
        InputError: the source has no labels, no layer is named, or there is no kernel.
        ShapeError: source labels are out of the model's range, or the domains' inputs differ in shape.

    Source: Long et al., ICML 2015, arXiv:1502.02791.
    """

    card = Card(
        paper="Long et al. (deep adaptation networks), ICML 2015",
        arxiv="1502.02791",
        carries="data",
        teacher="data",
        data="unlabelled",
        tasks=("classification",),
    )

    def __init__(self, layers: Sequence[str] = ("penultimate",), kernels: int = 5):
        super().__init__()
        if isinstance(layers, str) or not layers or kernels < 1:
            raise InputError(
                f"DAN: layers is {layers!r} and kernels {kernels}: name layers in a list, and 1 kernel or more"
            )
        self.layers, self.kernels = layers, kernels

    def wants(self) -> dict[str, list[str]]:
        return {"target": list(self.layers)}

    def loss(self, source: Outputs, target: Outputs, source_batch: Batch, target_batch: Batch, clock: Clock) -> Losses:
        return {
            f"mmd {layer}": Term(mmd(flat(source, layer), flat(target, layer), kernels=self.kernels))
            for layer in self.layers
        }

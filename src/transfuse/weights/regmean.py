"""RegMean: layers that do on every model's inputs what that model's layer did."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.run import Run
from transfuse.weights.averaged import Averaged, average, loaded

RIDGE = 1e-6
"""Added to the diagonal, as a share of its mean: inputs that are always 0 decide nothing."""


class RegMean(Averaged):
    """Choose each linear layer so that it does, on every model's own inputs, what that model's layer did.

        merged = (sum_i G_i)^-1 (sum_i G_i W_i^T), transposed,   G_i = mean of x x^T over the layer's inputs in model i

    The entries of G_i off its diagonal are multiplied by `off_diagonal`, without which the merge overfits the few
    inputs that were seen. Convolutions are linear layers of their patches. All other parameters are averaged.

    Args:
        off_diagonal: in [0, 1]; 1 is the exact least-squares solution.

    Raises:
        InputError: an argument is out of its range; no sources; a number of data sets that does not fit them.

    Source: Jin, Ren, Preotiuc-Pietro & Cheng, ICLR 2023, arXiv:2212.09849.
    """

    card = Card(
        paper="Jin, Ren, Preotiuc-Pietro & Cheng, ICLR 2023",
        arxiv="2212.09849",
        carries="weights",
        teacher="weights",
        data="unlabelled",
        tasks=("classification", "language-model", "token-classification", "segmentation", "regression"),
    )

    def __init__(self, off_diagonal: float = 0.9):
        super().__init__()
        if not 0 <= off_diagonal <= 1:
            raise InputError(f"RegMean: off_diagonal is {off_diagonal}, it must be between 0 and 1")
        self.off_diagonal = off_diagonal

    def setup(self, run: Run, sample: Batch | None) -> None:
        super().setup(run, sample)
        for role in run.sources:
            run.tap(role, [f"{name}:input" for name in layers_of(run[role])])

    def statistics(self, number: int, role: str, batch: Batch, run: Run) -> None:
        features = run(role, batch, grad=False).features
        for name, layer in layers_of(run[role]).items():
            inputs = patches(layer, features[f"{name}:input"])
            # A mean over positions of each sample, so that long samples weigh as much as short ones.
            self.add(number, f"{name}.weight", inputs.mT @ inputs * (batch.size / len(inputs)))

    @torch.no_grad()
    def deploy(self, target: nn.Module) -> nn.Module:
        states = [model.state_dict() for model in self._models]
        merged = average(states)
        for name in layers_of(target):
            key = f"{name}.weight"
            left: Tensor | float = 0.0
            right: Tensor | float = 0.0
            for number, state in enumerate(states):
                if (gram := self.statistic(number, key)) is None:
                    break  # a layer that was not run
                scaled = (gram * self.off_diagonal).double()
                scaled.diagonal().copy_(gram.diagonal())
                left = scaled + left
                right = scaled @ state[key].flatten(1).double().T + right
            else:
                assert isinstance(left, Tensor)
                assert isinstance(right, Tensor)
                left.diagonal().add_(RIDGE * left.diagonal().mean())
                merged[key] = torch.linalg.solve(left, right).T.reshape(merged[key].shape).to(merged[key].dtype)
        return loaded(target, merged)


def layers_of(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The linear layers and plain convolutions of a model, by their paths."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


def patches(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> Tensor:
    """What a layer multiplies its weight with, `(rows, entries)`."""
    if isinstance(layer, nn.Linear):
        return inputs.flatten(0, -2)
    unfolded = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    return unfolded.mT.flatten(0, 1)

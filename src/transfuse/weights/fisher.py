"""Fisher merging: weights count by how sure each model is of them."""

from __future__ import annotations

import torch
from torch import nn

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.run import Run
from transfuse.weights.averaged import Averaged, average, loaded
from transfuse.weights.base import weights_of

SMALLEST = 1e-12


class Fisher(Averaged):
    """Average weights by how sure each model is of them: the diagonal of its Fisher information.

        F_i = mean over samples x of E_{y ~ p_i(y | x)} [ (d log p_i(y | x) / d theta)**2 ]
        merged = sum_i w_i F_i theta_i / sum_i w_i F_i

    The expectation over classes is exact, so no labels are used; it takes a backward pass for each sample and class.
    Where no model is sure of a weight, it is the plain average.

    Args:
        weight: of every model, or a list with one for each.

    Raises:
        InputError: not one finite weight per model; no sources; a number of data sets that does not fit them.

    Source: Matena & Raffel, NeurIPS 2022, arXiv:2111.09832.
    """

    card = Card(
        paper="Matena & Raffel, NeurIPS 2022",
        arxiv="2111.09832",
        carries="weights",
        teacher="weights",
        data="unlabelled",
        tasks=("classification",),
    )

    def __init__(self, weight: float | list[float] = 1.0):
        super().__init__()
        self.weight = weight

    def statistics(self, number: int, role: str, batch: Batch, run: Run) -> None:
        parameters = {k: p for k, p in run[role].named_parameters() if p.is_floating_point()}
        for sample in range(batch.size):
            # Copies that ask for gradients: the source itself is frozen.
            own = {key: p.detach().requires_grad_() for key, p in parameters.items()}
            log_p = run(role, batch.slice(sample, sample + 1), params=own).logits.log_softmax(-1)[0]
            for c, p in enumerate(log_p.detach().exp().tolist()):
                gradients = torch.autograd.grad(log_p[c], list(own.values()), retain_graph=True, allow_unused=True)
                for key, gradient in zip(own, gradients, strict=True):
                    if gradient is not None:
                        self.add(number, key, p * gradient.square())

    @torch.no_grad()
    def deploy(self, target: nn.Module) -> nn.Module:
        weights = weights_of(self.weight, len(self._models), "Fisher", normalize=False)
        states = [model.state_dict() for model in self._models]
        merged = average(states)
        for key, mean in merged.items():
            total, count = torch.zeros_like(mean), torch.zeros_like(mean)
            for number, (w, state) in enumerate(zip(weights, states, strict=True)):
                if (sure := self.statistic(number, key)) is not None:
                    total += w * sure * state[key]
                    count += w * sure
            merged[key] = torch.where(count > SMALLEST, total / count.clamp(min=SMALLEST), mean).to(mean.dtype)
        return loaded(target, merged)

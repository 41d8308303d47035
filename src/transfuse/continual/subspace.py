"""Which directions of a layer's inputs earlier tasks use, and projections onto them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse.continual.heads import key
from transfuse.core.method import Bag
from transfuse.core.watch import TransferWarning

Matrix = nn.Linear | nn.Conv2d
ROUNDING = 1e-10
"""Share of the energy below which a direction is rounding."""


class SubspaceMemory(Bag):
    """For every layer a pool of orthonormal directions O, and for every task the columns B of it that the task uses.

    Tasks share directions, so a union of tasks' subspaces is a set of columns and needs no orthonormalisation.
    A layer's weight is seen as `(out, in)`; `in` is that of a linear layer, or channels x kernel of a convolution.
    Entries: `"<layer>"` the pool (in, directions), `"<layer>/<task>"` the columns of a task.
    """

    def add(self, layer: str, task: int, gram: Tensor, threshold: float) -> None:
        """Choose a task's basis: the fewest directions that hold a share `threshold` of its inputs' energy.

        Candidates are the pool's columns u, with score u^T R R^T u, and the left singular vectors of
        (I - O O^T) R, with score sigma^2; scores add up to ||R||_F^2. New ones that are chosen join the pool.

        Args:
            gram: R R^T, `(in, in)` float64, of the task's inputs R `(in, samples)`.
        """
        pool = self[key(layer)].to(gram) if key(layer) in self else gram.new_zeros(len(gram), 0)
        old, energies, directions = scores(gram, pool)
        ranked, order = torch.cat([old, energies]).sort(descending=True)
        count = 1 + int((ranked.cumsum(0) < threshold * gram.trace()).sum())
        count = min(count, int((ranked > ROUNDING * gram.trace()).sum()))
        chosen = order[:count].sort().values
        fresh = chosen[chosen >= len(old)] - len(old)
        columns = torch.cat([chosen[chosen < len(old)], len(old) + torch.arange(len(fresh), device=gram.device)])
        self[key(layer)] = torch.cat([pool, orthonormal(directions[:, fresh], pool)], dim=1).float()
        self[key(layer, task)] = columns
        if self[key(layer)].shape[1] == len(gram):
            warnings.warn(
                f"the tasks so far use all {len(gram)} input directions of the layer {layer!r}: it is frozen from now "
                "on. Lower the threshold, or use a wider target",
                TransferWarning,
                stacklevel=2,
            )

    def basis(self, layer: str, task: int) -> Tensor:
        """The orthonormal basis of a task, `(in, rank)`.

        Raises:
            KeyError: the task has not been added.
        """
        return self[key(layer)][:, self[key(layer, task)]]

    def union(self, layer: str, tasks: Iterable[int]) -> Tensor:
        """An orthonormal basis of the sum of several tasks' subspaces, `(in, rank)`; each shared direction once."""
        columns = [self[key(layer, task)] for task in tasks]
        return self[key(layer)][:, torch.cat(columns).unique()]

    def project(self, layer: str, matrix: Tensor, tasks: Iterable[int]) -> Tensor:
        """The part of the rows of a matrix `(out, in)` in the sum of several tasks' subspaces."""
        tasks = list(tasks)
        if not tasks:
            return torch.zeros_like(matrix)
        basis = self.union(layer, tasks).to(matrix.dtype)
        return matrix @ basis @ basis.T


def scores(gram: Tensor, pool: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The energy of inputs along a pool's columns, and the directions and energies of what the pool leaves.

    Args:
        gram: R R^T, `(in, in)`.
        pool: orthonormal columns, `(in, directions)`.

    Returns:
        Energies of the pool's columns; energies, descending, and directions `(in, in - directions)` of the rest.
    """
    old = (pool * (gram @ pool)).sum(0)
    rest = torch.eye(len(gram)).to(gram) - pool @ pool.T
    energies, directions = torch.linalg.eigh(rest @ gram @ rest)
    free = len(gram) - pool.shape[1]
    return old, energies.flip(0)[:free].clamp(min=0), directions.flip(1)[:, :free]


def orthonormal(directions: Tensor, pool: Tensor) -> Tensor:
    """Directions made orthogonal to a pool and to each other, against rounding."""
    return torch.linalg.qr(directions - pool @ (pool.T @ directions)).Q


def matrix_layers(model: nn.Module) -> dict[str, Matrix]:
    """The layers, by path, that multiply their inputs, or patches of them, with one matrix."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        or (
            isinstance(layer, nn.Conv2d)
            and layer.groups == 1
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        )
    }


def input_rows(layer: Matrix, inputs: Tensor) -> Tensor:
    """The vectors that a layer's matrix is multiplied with, `(rows, in)`: tokens, or unfolded patches."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        patches = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return patches.transpose(1, 2).flatten(0, 1)
    return inputs.flatten(0, -2)

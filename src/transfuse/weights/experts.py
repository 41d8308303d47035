"""Mixtures of experts that are made from dense networks: copies of a perceptron, or groups of its units."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfuse.core.errors import InputError, MissingExtraError
from transfuse.weights.layout import layers_of, transposed

ITERATIONS = 1000
"""Of k-means at most; it stops when nothing moves."""


def top_k_gates(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights and numbers of each token's best experts, both `(tokens, top_k)`.

    Weights are the softmax over the chosen scores alone, so they sum to 1.
    """
    best, chosen = scores.topk(top_k, -1)
    return best.float().softmax(-1), chosen


class Experts(nn.Module):
    """A router and its experts, in the place of one network: `y = sum over the chosen e of weight_e * expert_e(x)`.

    Args:
        experts: networks of one shape, `(tokens, width)` to the same.
        width: of the tokens.
        top_k: how many experts each token is given to.
        std: of the router's first weights.
    """

    def __init__(self, experts: Sequence[nn.Module], width: int, top_k: int, std: float):
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(width, len(experts), bias=False)
        self.experts = nn.ModuleList(experts)
        nn.init.normal_(self.router.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` to the same; every expert runs once, on the tokens that chose it."""
        weights, chosen = top_k_gates(self.router(x).flatten(0, -2), self.top_k)
        tokens = x.flatten(0, -2)
        found = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            rows, place = (chosen == e).nonzero(as_tuple=True)
            part = weights[rows, place, None] * expert(tokens[rows])  # none are no error, and a gradient of 0
            found = found.index_add(0, rows, part.to(found.dtype))
        return found.view_as(x)


def upcycled(model: nn.Module, experts: int, top_k: int, std: float) -> tuple[nn.Module, list[str]]:
    """A copy of a transformer whose perceptrons have become mixtures of equal copies, and where these are.

    Raises:
        InputError: its blocks are unknown, or a perceptron is no module of its own.
    """
    model, paths = copy.deepcopy(model), []
    for layer in layers_of(model):
        path, up = layer.perceptron, model.get_submodule(layer.rise[0])
        if path == layer.block:
            raise InputError(f"the perceptron of {path} is no module of its own, so experts cannot take its place")
        weight = up.weight
        assert isinstance(weight, Tensor)
        width = weight.shape[0 if transposed(up) else 1]
        dense = model.get_submodule(path)
        mixture = Experts([copy.deepcopy(dense) for _ in range(experts)], width, top_k, std)
        model.set_submodule(path, mixture.to(weight).train(dense.training))
        paths.append(path)
    return model, paths


def balanced_clusters(rows: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """k-means of unit-length rows in which every cluster has equally many, `(rows,)` numbers of clusters.

    Assignments are optimal for the centres at hand (a linear assignment problem, cubic in the rows), centres are means.

    Args:
        rows: `(rows, width)`; they are scaled to length one.
        seed: of the first centres (k-means++).

    Raises:
        InputError: the clusters do not divide the rows, or a row is not finite.
        MissingExtraError: SciPy is not installed.
    """
    if clusters < 1 or len(rows) % clusters:
        raise InputError(f"{len(rows)} units cannot be split into {clusters} equal experts: choose a divisor")
    if not rows.isfinite().all():
        raise InputError("a unit's weights are not finite, so it belongs to no expert")
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingExtraError("scipy", "data", "clustering units into experts") from None
    points, each = F.normalize(rows.detach().double().cpu(), dim=-1), len(rows) // clusters
    centres = _first_centres(points, clusters, torch.Generator().manual_seed(seed))
    found = torch.full((len(rows),), -1)
    for _ in range(ITERATIONS):
        cost = torch.cdist(points, centres).square().repeat_interleave(each, 1)
        before, found = found, torch.from_numpy(linear_sum_assignment(cost.numpy())[1]) // each
        if torch.equal(before, found):
            break
        centres = torch.stack([points[found == e].mean(0) for e in range(clusters)])
    return found.to(rows.device)


def _first_centres(points: Tensor, clusters: int, draw: torch.Generator) -> Tensor:
    chosen = [int(torch.randint(len(points), (1,), generator=draw))]
    for _ in range(clusters - 1):
        distance = torch.cdist(points, points[chosen]).square().amin(1)
        distance[chosen] = 0
        chances = distance + 1e-12
        chances[chosen] = 0
        chosen.append(int(torch.multinomial(chances, 1, generator=draw)))
    return points[chosen]

"""Sources without content: labelled noise, to ask what in a source is of use to a target.

After the noise domains of Yao et al., 2025, arXiv:2502.13573. Inputs are float32 `(width,)`, labels 0, 1, ...; there
is a train part only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from transfuse.core.errors import InputError, nearest
from transfuse.datasets.splits import Splits
from transfuse.losses.reduction import IGNORE

DISTRIBUTIONS = ("gaussian", "shared gaussian", "uniform", "laplace")
FEWEST, MOST = 100, 1000


def noise(
    distribution: str = "gaussian", classes: int = 10, per_class: int = 100, width: int = 256, seed: int = 0
) -> Splits:
    """Labelled noise of a simple distribution.

    Args:
        distribution: `"gaussian"`: every class has a mean of its own, drawn from N(0, I), and covariance I.
            In the others all classes share one distribution, so that labels mean nothing: `"shared gaussian"` has
            one such mean for all, `"uniform"` is U(-10, 10) and `"laplace"` Laplace(0, 1) in every dimension.
        classes, per_class, width: how many classes, samples of each, and dimensions.
        seed: of every draw.

    Raises:
        InputError: an unknown distribution, or a size below 1.
    """
    if distribution not in DISTRIBUTIONS:
        raise InputError(f"there is no noise {distribution!r}: {nearest(distribution, DISTRIBUTIONS)}")
    _require_sizes(classes=classes, per_class=per_class, width=width)
    draw = torch.Generator().manual_seed(seed)
    shape = (classes, per_class, width)
    if distribution == "uniform":
        inputs = torch.rand(shape, generator=draw) * 20 - 10
    elif distribution == "laplace":  # the difference of two exponentials
        one, other = torch.empty(shape), torch.empty(shape)
        inputs = one.exponential_(generator=draw) - other.exponential_(generator=draw)
    else:
        means = torch.randn(classes if distribution == "gaussian" else 1, 1, width, generator=draw)
        inputs = means + torch.randn(shape, generator=draw)
    return _splits(inputs.flatten(0, 1), torch.full((classes,), per_class), f"{distribution} noise")


def noise_sweep(alpha: float = 1.0, classes: int = 10, width: int = 256, seed: int = 0) -> Splits:
    """Gaussian noise whose classes lie further apart the larger `alpha` is: one point of the paper's sweep.

    Class k = 1, 2, ... has 100 to 1,000 samples, the mean k * alpha * N(0, I) and the covariance k * alpha * Sigma_k,
    where Sigma_k is the positive part of a random symmetric matrix. With one seed all values of `alpha` scale the same
    draw: means with alpha, deviations with its root. The paper takes 0.05, 0.15, ..., 9.95.

    Raises:
        InputError: `alpha` is not positive, or a size below 1.
    """
    if alpha <= 0:
        raise InputError(f"alpha is {alpha}, it must be positive")
    _require_sizes(classes=classes, width=width)
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(FEWEST, MOST + 1, (classes,), generator=draw)
    rows = []
    for k, count in enumerate(counts.tolist(), start=1):
        mean = torch.randn(width, generator=draw)
        deviations = torch.randn(count, width, generator=draw) @ _root_of_covariance(width, draw)
        rows.append(k * alpha * mean + (k * alpha) ** 0.5 * deviations)
    return _splits(torch.cat(rows), counts, f"noise of strength {alpha:g}")


def permuted_classes(data: TensorDataset, seed: int = 0) -> TensorDataset:
    """The same samples with the classes renamed: what a class is called is destroyed, who belongs together is not.

    Every class gets another one's name, by a bijection without fixed points. (Labels exchanged between *samples*
    would destroy the classes themselves; that is another experiment.)

    Raises:
        InputError: it is no `TensorDataset(inputs, labels)`, or has fewer than two classes.
    """
    if not isinstance(data, TensorDataset) or len(data.tensors) != 2:
        raise InputError(f"classes can be renamed in a TensorDataset(inputs, labels), found {type(data).__name__}")
    inputs, labels = data.tensors
    present = labels[labels != IGNORE].unique()
    if len(present) < 2:
        raise InputError(f"renaming classes needs at least two, found {len(present)}")
    cycle = present[torch.randperm(len(present), generator=torch.Generator().manual_seed(seed))]
    renamed = labels.clone()
    for old, new in zip(cycle.tolist(), cycle.roll(1).tolist(), strict=True):
        renamed[labels == old] = new
    return TensorDataset(inputs, renamed)


def _root_of_covariance(width: int, draw: torch.Generator) -> Tensor:
    """A matrix R with R'R = the positive part of a random symmetric matrix."""
    square = torch.randn(width, width, generator=draw)
    values, vectors = torch.linalg.eigh((square + square.mT) / 2)
    return values.clamp_min(0).sqrt()[:, None] * vectors.mT


def _splits(inputs: Tensor, counts: Tensor, name: str) -> Splits:
    labels = torch.arange(len(counts)).repeat_interleave(counts)
    return Splits(TensorDataset(inputs, labels), classes=tuple(map(str, range(len(counts)))), name=name)


def _require_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} is {size}, it must be at least 1")

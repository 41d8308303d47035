"""How far a model's features go on another task: a new linear layer on top of what is frozen."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transfuse.core import rng
from transfuse.core.errors import InputError
from transfuse.core.outputs import call
from transfuse.core.probe import no_trace
from transfuse.core.taps import PENULTIMATE, Taps
from transfuse.losses import IGNORE, cross_entropy
from transfuse.measure.base import batches, device_of


class Probe(NamedTuple):
    """Mean cross-entropy and accuracy on test data of a linear layer on frozen features."""

    loss: float
    accuracy: float


def linear_transfer(
    source: nn.Module,
    train: Any,
    test: Any,
    *,
    epochs: int = 10,
    lr: float = 0.1,
    batch_size: int = 64,
    layer: str = PENULTIMATE,
    seed: int = 0,
) -> Probe:
    """Knowledge transferability: freeze a source up to its last layer, train a new one on a target's data, test it.

    Stochastic gradient descent with momentum 0.9, weight decay 1e-4 and the learning rate on a cosine, as Liang et
    al., 2021 (arXiv:2006.14512) published it. Features are computed once, so an epoch costs next to nothing.

    Args:
        source: any classifier; it is not changed.
        train, test: labelled data of the target.
        layer: the features, see :mod:`transfuse.core.taps`.
        seed: of the new layer and of the order of samples.

    Raises:
        InputError: train or test has no labels.
        LayerError: there is no such layer.
    """
    with no_trace(source, seed=rng.derive(seed, "linear transfer")):
        source.eval()
        (inputs, labels), (test_inputs, test_labels) = (features(source, d, layer, batch_size) for d in (train, test))
        head = nn.Linear(inputs.shape[1], int(max(labels.max(), test_labels.max())) + 1)
        updates = epochs * -(-len(inputs) // batch_size)
        optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        with torch.enable_grad():
            for _ in range(epochs):
                for rows in torch.randperm(len(inputs)).split(batch_size):
                    optimizer.zero_grad()
                    cross_entropy(head(inputs[rows]), labels[rows]).mean().backward()
                    optimizer.step()
                    schedule.step()
        with torch.no_grad():
            logits = head(test_inputs)
        loss = cross_entropy(logits, test_labels).mean()
        return Probe(float(loss), float((logits.argmax(dim=1) == test_labels).double().mean()))


@torch.no_grad()
def features(model: nn.Module, data: Any, layer: str, batch_size: int) -> tuple[Tensor, Tensor]:
    """What a layer gives for all labelled samples, flattened: `(samples, features)` and `(samples,)` on the CPU."""
    found, labels = [], []
    taps: Taps | None = None
    try:
        for batch in batches(data, batch_size, device_of(model)):
            if batch.labels is None:
                raise InputError("a linear layer is trained and tested on labels, and the data has none")
            taps = taps or Taps(model, [layer], batch.inputs)
            with taps.open() as read:
                call(model, batch.inputs)
            known = batch.labels != IGNORE
            found.append(read[layer].float().flatten(1)[known].cpu())
            labels.append(batch.labels[known].cpu())
    finally:
        if taps is not None:
            taps.remove()
    return torch.cat(found), torch.cat(labels)

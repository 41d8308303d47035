"""AdaMerging: how much of every task vector goes into a model for all tasks, learned without labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.phases import Batches, Losses
from transfuse.core.run import Run
from transfuse.core.streams import Data, Stream
from transfuse.weights.scaling import Scaling


class AdaMerging(Scaling):
    """Merge models by coefficients that make the merged model's predictions sure on unlabelled data of all tasks.

        theta^(j) = theta_0^(j) + sum over sources i of L_ij tau_i^(j),    L_ij within [0, 1]
        loss = sum over tasks of the mean entropy of softmax(merged)

    Every L_ij begins at `start`. The target is the base, the sources are one model for each task, and
    `data={"digits": ..., "letters": ...}` (or a list) has inputs of every task, as a rule those that predictions are
    wanted for. A target whose `forward` has a parameter `task` is told the number of the data set, and may have a head
    for each. The authors take Adam, lr=1e-3, 500 steps of 16 samples of every task.

    Args:
        per: `"layer"`, a coefficient for each source and parameter tensor, or `"task"`, one for each source.
        start: what they are at first, within [0, 1].

    Raises:
        InputError: an argument is out of its range; sources or data are missing; a source was not trained from this
            base, or holds NaN.
        ShapeError: a source's tensor differs in shape from the base's.

    Source: Yang et al., ICLR 2024, arXiv:2310.02575.
    """

    card = Card(
        paper="Yang et al., ICLR 2024",
        arxiv="2310.02575",
        carries="weights",
        teacher="weights",
        data="unlabelled",
        tasks=("classification", "language-model"),
    )

    def __init__(self, per: Literal["layer", "task"] = "layer", start: float = 0.3):
        super().__init__()
        if per not in ("layer", "task"):
            raise InputError(f"AdaMerging: per is {per!r}, it must be 'layer' or 'task'")
        if not 0 <= start <= 1:
            raise InputError(f"AdaMerging: start is {start}, it must be between 0 and 1")
        self.per, self.start, self.blockwise = per, start, per == "layer"

    def scales(self) -> Tensor:
        return super().scales().clamp(0, 1)

    def streams(self, run: Run) -> Mapping[str, Stream | Data]:
        return {name: data.without_labels() for name, data in run.data.items()}

    def loss(self, batches: Batches, run: Run) -> Losses:
        return self.entropies_of(batches, run)

"""What a method remembers of every sample, by the sample's id."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError
from transfuse.core.method import Bag
from transfuse.losses.feature import unit


class Memory(Bag):
    """One unit vector for every sample, moved by :meth:`update` in `after_update`, and by no gradient.

    It is saved with the method. Batches are looked up by their `index`, which names a sample in the root data set
    whatever subset is trained on.

    Args:
        ids: of all samples, each once.
        width: of the vectors. They begin in random directions, drawn from the global generator.

    Raises:
        InputError: an id occurs twice.
    """

    def __init__(self, ids: Tensor, width: int):
        super().__init__()
        self["ids"] = ids.unique()
        if len(self["ids"]) < len(ids):
            raise InputError(
                f"a memory needs every sample once, found {len(ids)} with {len(self['ids'])} different ids"
            )
        self["rows"] = unit(2 * torch.rand(len(ids), width) - 1)

    def __len__(self) -> int:
        return len(self["ids"])

    def find(self, index: Tensor | None) -> Tensor:
        """The rows, `(batch,)`, that belong to the `index` of a batch.

        Raises:
            InputError: there is no index, a sample occurs twice in it or is unknown.
        """
        if index is None:
            raise InputError(
                "this method remembers samples, and the batch does not say which ones it holds: pass a data set "
                "rather than batches, or yield mappings with the keys inputs, labels and index"
            )
        if len(index.unique()) < len(index):
            raise InputError("a sample occurs twice in one batch: what is remembered of it would depend on the order")
        rows = torch.searchsorted(self["ids"], index)
        known = self["ids"][rows.clamp(max=len(self) - 1)] == index
        if not known.all():
            raise InputError(
                f"sample {int(index[~known][0])} is not among the {len(self)} that this memory was made for"
            )
        return rows

    @torch.no_grad()
    def update(self, rows: Tensor, values: Tensor, momentum: float = 0.5) -> None:
        """Move rows towards new values, `(batch, width)`: unit(momentum * row + (1 - momentum) * value)."""
        self["rows"][rows] = unit(momentum * self["rows"][rows] + (1 - momentum) * values)


class Others(nn.Module):
    """Draws samples that are other than a given one: any other, or one of another group.

    Args:
        size: number of samples.
        groups: `(size,)` a number for the group of each sample; negative where it has none, and then only the
            sample itself is no other. None puts every sample into a group of its own.

    Raises:
        InputError: for some sample there is no other.
    """

    def __init__(self, size: int, groups: Tensor | None = None):
        super().__init__()
        alone = torch.arange(size)
        groups = alone if groups is None else torch.where(groups < 0, groups.max() + 1 + alone, groups)
        _, group, sizes = groups.unique(return_inverse=True, return_counts=True)
        if int(sizes.max()) == size:
            raise InputError(f"all of the {size} samples are in one group, so there are no others to draw")
        # Sorted by group, what is to be left out lies together: how many samples, and from which place on.
        self.order: Tensor
        self.skipped: Tensor
        self.start: Tensor
        for name, values in (
            ("order", groups.argsort(stable=True)),
            ("skipped", sizes[group]),
            ("start", (sizes.cumsum(0) - sizes)[group]),
        ):
            self.register_buffer(name, values, persistent=False)

    def draw(self, rows: Tensor, count: int) -> Tensor:
        """Draw `count` others for each of the rows, uniformly and with replacement: `(batch, count)`."""
        start, skipped = self.start[rows, None], self.skipped[rows, None]
        chance = torch.rand(len(rows), count, dtype=torch.float64, device=rows.device)
        places = (chance * (len(self.order) - skipped)).long()
        return self.order[places + skipped * (places >= start)]

"""The family of search: results on cheap tasks decide which network is worth an expensive one.

The target is a network that holds many (:class:`~transfuse.search.elastic.ElasticNet`); the user gets back one of
them. The caller gives `data={"train": ..., "probe": ...}`: the probe samples score candidates, and are never trained
on. What scoring costs is paid once: a candidate's code and its score are kept, and survive a resume.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from transfuse.core.batch import Batch
from transfuse.core.errors import InputError
from transfuse.core.method import Method
from transfuse.core.run import Run
from transfuse.core.streams import Draw
from transfuse.losses import IGNORE
from transfuse.search.elastic import ElasticNet, recalibrate
from transfuse.search.space import Spec


class Search(Method):
    """Base of the family: how candidates are scored.

    Args:
        calibration: training batches that a candidate's running statistics are estimated from.
    """

    family = "search"
    uses_source = False

    def __init__(self, calibration: int = 4):
        super().__init__()
        if calibration < 1:
            raise InputError(f"{type(self).__name__}: calibration is {calibration}: statistics need a batch or more")
        self.calibration = calibration

    def setup(self, run: Run, sample: Batch | None) -> None:
        if set(run.data) != {"train", "probe"}:
            raise InputError(
                f"{type(self).__name__} trains on one data set and scores candidates on another, found "
                f'{", ".join(run.data) or "none"}: pass data={{"train": ..., "probe": ...}}'
            )
        if not isinstance(run["target"], ElasticNet):
            raise InputError(
                f"the target is a {type(run['target']).__name__}: expected a network that holds others, an ElasticNet"
            )

    def supernet(self, run: Run) -> ElasticNet:
        """The network that holds all others."""
        net = run["target"]
        assert isinstance(net, ElasticNet)
        return net

    @torch.no_grad()
    def score(self, net: ElasticNet, spec: Spec, run: Run) -> float:
        """Accuracy of a candidate on the probe samples, with running statistics of its own.

        Under `run.probe()`, which puts back the statistics that it changes.
        """
        with net.using(spec):
            recalibrate(net, self._calibration_batches(run))
            net.eval()
            right, count = 0, 0
            for batch in _batches(run, "probe"):
                known = batch.labels != IGNORE
                right += int((net(batch.inputs).argmax(1) == batch.labels)[known].sum())
                count += int(known.sum())
        if not count:
            raise InputError("no probe sample has a label, so no candidate can be scored")
        return right / count

    def _calibration_batches(self, run: Run) -> list[Tensor]:
        batches = (batch.inputs for batch in _batches(run, "train"))
        return [inputs for inputs, _ in zip(batches, range(self.calibration), strict=False)]


def _batches(run: Run, stream: str) -> Iterator[Batch]:
    """The samples of a stream in their own order, on the device."""
    draw = Draw(256, None, shuffle=False, seed=0)
    for micro in run.data[stream].epoch(draw, 0):
        for batch in micro:
            yield batch.to(run.device)

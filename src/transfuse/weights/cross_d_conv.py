"""Cross-D Conv: kernels of volumes, learned on images."""

from __future__ import annotations

from typing import Any

from torch import nn

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError
from transfuse.core.head import head_of
from transfuse.core.labels import labels_term
from transfuse.core.method import Bag, Method
from transfuse.core.phases import Batches, Gradients, Losses, Phase, Stage
from transfuse.core.run import Run
from transfuse.core.streams import Indexed
from transfuse.weights.dimensions import KERNELS, Kernels, Steer, carry, flattened, plane_masks, require_steer


class CrossDConv(Method):
    """Train three-dimensional kernels through planes of them on images, then go on with volumes.

        stage 1 (images):   the target's shape with CrossDConv2d for Conv3d; loss = CE(labels)
        stage 2 (volumes):  kernels, normalisation and everything but the head copied; loss = CE(labels)

    `source=` is the labelled images, `data=` the labelled volumes, `target=` a network for volumes; it stays one of its
    class. A stage has the caller's epochs or steps. Pooling must be by layers, or by functions that do not count
    dimensions (`x.flatten(2).mean(-1)`). The steering of the kernels, :class:`~transfuse.weights.dimensions
    .CrossDConv2d`, serves the images alone.

    Args:
        kernels: `"cross"`; or a baseline: ordinary convolutions of images that are then `"inflate"`d along depth
            (I3D), or laid into the three planes, where they stay (`"acs"`).
        steer: `"shift"` (the paper's) or `"rotate"`.
        centred: leave the constant shift by one voxel out.
        tune: `"all"`, or `"head"`: features stay as images have formed them.
        image_epochs: of the first stage, where it is not to have the caller's length.
        image_lr_scale: factor of the caller's learning rate in the first stage.

    Raises:
        InputError: an argument is unknown or out of range, or a moving average is asked for.
        LayerError: a layer of the target has no counterpart for images, or is not the same along all axes.

    Source: Yavuz & Yang, 2024, arXiv:2411.02441.
    """

    card = Card(
        paper="Yavuz & Yang, 2024",
        arxiv="2411.02441",
        sheet=175,
        carries="weights",
        teacher="data",
        data="labelled",
        tasks=("classification",),
    )
    family = "weights"
    brings_head = True

    def __init__(
        self,
        kernels: Kernels = "cross",
        steer: Steer = "shift",
        centred: bool = False,
        tune: str = "all",
        image_epochs: float | None = None,
        image_lr_scale: float = 1.0,
    ):
        super().__init__()
        if kernels not in KERNELS:
            raise InputError(f"CrossDConv: kernels is {kernels!r}, it must be one of {', '.join(KERNELS)}")
        if tune not in ("all", "head"):
            raise InputError(f"CrossDConv: tune is {tune!r}, it must be 'all' or 'head'")
        if image_epochs is not None and not image_epochs > 0:
            raise InputError(f"CrossDConv: image_epochs is {image_epochs}, it must be positive")
        if not image_lr_scale > 0:
            raise InputError(f"CrossDConv: image_lr_scale is {image_lr_scale}, it must be positive")
        require_steer("CrossDConv", steer, centred)
        self.kernels, self.steer, self.centred = kernels, steer, centred
        self.tune, self.image_epochs, self.image_lr_scale = tune, image_epochs, image_lr_scale
        self.planes = Bag()
        """Share of the squared norm that each plane of a layer's carried kernels has, by its path."""

    def setup(self, run: Run, sample: Batch | None) -> None:
        if sample is None or not isinstance(images := run.data["source"], Indexed):
            raise InputError("CrossDConv reads volumes (data=) and labelled images (source=): pass data sets of both")
        if run.training is not None and run.training.ema is not None:
            raise InputError(
                f"ema is {run.training.ema}: it would average over weights from before the images: leave it out"
            )
        self._head = head_of(run["target"], sample.inputs)
        twin = flattened(run["target"], self.kernels, self.steer, self.centred)
        parent, _, name = self._head.rpartition(".")
        old: Any = twin.get_submodule(self._head)
        new = nn.Linear(old.in_features, int(images.all_labels().max()) + 1)
        setattr(twin.get_submodule(parent), name, new)
        run.add("images", twin.to(run.device))

    def begin_stage(self, i: int, run: Run) -> bool:
        if i == 1:
            carry(run["images"], run["target"], self.kernels, skip=(self._head,))
            for path, layer in run["target"].named_modules():
                if isinstance(layer, nn.Conv3d) and layer.weight.shape[-1] > 1:
                    energy = layer.weight.detach().square().sum((0, 1, 3, 4))
                    self.planes[path.replace(".", "/")] = energy / energy.sum()
        return i < 2

    def stage(self, i: int, run: Run) -> Stage:
        if i == 0:
            group = {"params": list(run["images"].parameters()), "lr_scale": self.image_lr_scale}
            phase = Phase("images", self.losses, [group])
            return Stage({"source": run.data["source"]}, [phase], epochs=self.image_epochs, train=("images",))
        whole = self.tune == "all"
        params = run["target"] if whole else run["target"].get_submodule(self._head)
        edit = self._keep_planes if whole and self.kernels == "acs" else None
        phase = Phase("volumes", self.losses, params.parameters(), edit=edit)
        # A frozen network stays as it is: its normalisation must not follow the volumes.
        return Stage({"data": run.data["data"]}, [phase], train=("target",) if whole else ())

    def losses(self, batches: Batches, run: Run) -> Losses:
        role, batch = ("images", batches["source"]) if run.clock.stage == 0 else ("target", batches["data"])
        return {"labels": labels_term(run(role, batch).logits, batch)}

    def _keep_planes(self, gradients: Gradients, run: Run) -> None:
        masks = plane_masks(run["target"])
        for parameter, gradient in gradients.items():
            if parameter in masks:
                gradient.mul_(masks[parameter])

    def panels(self) -> list[dict[str, Any]]:
        series = {
            name.replace("/", "."): [(float(i), float(share)) for i, share in enumerate(shares)]
            for name, shares in self.planes.named_buffers()
        }
        if not series:
            return []
        note = "What images have put into each plane of the kernels: only the middle one of the moved kernel met them."
        title = "Share of the kernels' squared norm by plane"
        return [{"kind": "lines", "title": title, "note": note, "x": "plane", "y": "share", "series": series}]

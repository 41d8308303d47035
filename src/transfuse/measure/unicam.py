"""What a distilled student knows that its undistilled twin does not: where it is seen, and how relevant it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.card import Card
from transfuse.core.errors import InputError, LayerError
from transfuse.core.outputs import call, find_logits
from transfuse.core.taps import Taps
from transfuse.losses import distance_correlation, u_centred, u_correlation, u_product, u_removed
from transfuse.losses.feature import unit
from transfuse.measure.base import Measure, Measurement, Table, batches, device_of, named_models, single_model
from transfuse.measure.imputation import impute

PERMUTATIONS = 20


class UniCAM(Measure):
    """Show and score what one network knows and another does not, by the distances between samples.

    P_X: U-centred distances between the features X of a batch (:func:`~transfuse.losses.relation.u_centred`)
    P_X|Y = P_X - <P_X, P_Y> / <P_Y, P_Y> P_Y         what X knows that Y does not
    R(P, Q) = <P, Q> / sqrt(<P, P> <Q, Q>)            in [-1, 1]
    UniCAM of X given Y: J = R(P_X|Y, P_E), E an embedding of each sample's class; with X's activations A,
      map = relu(sum_c mean_hw(dJ/dA_c) A_c), scaled to [0, 1] in each picture; Y is constant
    RS(X) = R(P_X, P_E);  FSS(X, Y) = biased distance correlation of rows of length 1

    J couples a batch: a picture's map depends on its mates. The two scores are different estimators, not comparable.
    One layer gives both features and maps, so they are always about the same depth.

    `measure(source=teacher or {"teacher": T, "base": B}, target=student, data=labelled pictures)`; the base is the
    student trained without a teacher. Compare maps with a second base of another seed: two networks differ by chance.

    Numbers: `fss X` of each network X and the teacher, `rs X` and `rs X|Y`. Tables: `rs`, signed and absolute, and
    `null`, the mean absolute value with classes dealt out to other samples. Images: `X|Y`, student and base (without
    a base: student and teacher) both ways.

    Args:
        layer: of student and base, see :mod:`transfuse.core.taps`; for maps one that gives `(batch, channels, h, w)`.
        source_layer: of the teacher; None: the same.
        embeddings: one row per class; None: one-hot, which tells only equal from different.
        keep: FSS and RS look at pictures of which this share of the pixels is left, those most relevant for the true
            class by HiResCAM, the others filled in (:func:`~transfuse.measure.imputation.impute`); 0.2 is the
            published script's. None looks at the pictures as they are.
        progression: further layers of the student; the number `progression L` is R of their features and those of
            `layer`.
        maps: how many pictures of the data get maps.
        batch_size: pictures at once. A batch needs two classes of two samples, or it is skipped and counted.

    Raises:
        InputError: an argument is out of range; (in `measure`) no labels, no batch fit to be used, or a label without
            an embedding.
        LayerError: a layer is missing or gives no map.

    Source: Adhane et al., WACV 2025, arXiv:2412.13943; removal by Zhen et al., ECCV 2022, arXiv:2207.09684.
    """

    card = Card(
        paper="Adhane et al., WACV 2025",
        arxiv="2412.13943",
        sheet=26,
        carries="features",
        teacher="features",
        data="labelled",
        tasks=("classification",),
    )

    def __init__(
        self,
        layer: str,
        source_layer: str | None = None,
        embeddings: Sequence[Sequence[float]] | None = None,
        keep: float | None = 0.2,
        progression: Sequence[str] = (),
        maps: int = 64,
        batch_size: int = 64,
    ):
        if keep is not None and not 0 < keep <= 1:
            raise InputError(f"keep is the share of pixels that is left, above 0 and at most 1, found {keep}")
        if batch_size < 4 or maps < 0:
            raise InputError(f"a batch has 4 pictures or more, and maps are 0 or more, found {batch_size} and {maps}")
        self.layer, self.source_layer, self.embeddings = layer, source_layer, embeddings
        self.keep, self.progression, self.maps, self.batch_size = keep, tuple(progression), maps, batch_size

    def look(self, source: Any, target: Any, data: Any) -> Measurement:
        networks = self._networks(source, target)
        pairs = [("student", "base"), ("base", "student")] if "base" in networks else []
        pairs += [("student", "teacher"), ("teacher", "student")]
        seen: dict[str, list[Tensor]] = {name: [] for name in (*networks, *self.progression)}
        images: dict[str, list[Tensor]] = {f"{x}|{y}": [] for x, y in pairs[:2]}
        classes, sizes, room, skipped = [], {}, self.maps, 0
        for batch in batches(data, self.batch_size, device_of(networks["student"][0])):
            if not _fit(batch):
                skipped += 1
                continue
            activations = {}
            for name, (model, layer) in networks.items():
                activations[name], pictures = self._pictures(model, layer, batch)
                further = self.progression if name == "student" else []
                read = _read(model, [layer, *further], pictures)
                for key, path in ((name, layer), *((path, path) for path in further)):
                    seen[key].append(read[path].flatten(1).cpu())
                sizes[name] = tuple(activations[name].shape[2:])
            for x, y in pairs[:2] if room else []:
                found = unicam(activations[x], activations[y], self._embedded(batch.labels), batch.inputs.shape[-2:])
                images[f"{x}|{y}"].append(found[:room].cpu())
            room = max(0, room - len(batch.labels))
            classes.append(batch.labels.cpu())
        if not classes:
            raise InputError(
                f"none of {skipped} batches of {self.batch_size} has two classes with two samples each: shuffle the "
                "data, or choose a larger batch_size"
            )
        features, labels = {name: torch.cat(rows) for name, rows in seen.items()}, torch.cat(classes)
        notes = [f"{len(labels)} samples; {skipped} batches without two classes of two samples were skipped"]
        if len(set(sizes.values())) > 1:
            notes.append(f"the layers differ in size, so they may not be at the same depth: {sizes}")
        if self.embeddings is None:
            notes.append("one-hot classes: RS tells only equal classes from different ones")
        numbers, table = self._scores(features, labels, list(networks), pairs)
        shown = {name: torch.cat(found) for name, found in images.items() if found}
        return Measurement(repr(self), numbers, tables={"rs": table}, images=shown, notes=notes)

    def _networks(self, source: Any, target: Any) -> dict[str, tuple[nn.Module, str]]:
        models = named_models(source, "source")
        if isinstance(source, nn.Module):
            models = {"teacher": source}
        if not {"teacher"} <= set(models) <= {"teacher", "base"}:
            raise InputError(
                f"the source of UniCAM is a teacher, or {{'teacher': ..., 'base': ...}}, found {', '.join(models)}"
            )
        models = {"teacher": models["teacher"], "student": single_model(target, "target"), **models}
        layers = {"teacher": self.source_layer or self.layer}
        return {name: (model, layers.get(name, self.layer)) for name, model in models.items()}

    def _embedded(self, labels: Tensor) -> Tensor:
        """The embedding of each sample's class, `(samples, width)`."""
        if self.embeddings is None:
            return F.one_hot(labels).float()
        table = torch.as_tensor(self.embeddings, dtype=torch.float32, device=labels.device)
        if labels.max() >= len(table):
            raise InputError(f"there are {len(table)} embeddings of classes, and the data has label {labels.max()}")
        return table[labels]

    def _pictures(self, model: nn.Module, layer: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """The layer's activations, and the pictures that features are taken from."""
        if self.keep is None:
            activations = _read(model, [layer], batch.inputs)[layer]
        else:
            activations, relevance = hirescam(model, layer, batch.inputs, batch.labels)
        if activations.dim() != 4 and (self.keep is not None or self.maps):
            raise LayerError(
                f"maps need a layer that gives (batch, channels, height, width), {layer!r} gives "
                f"{tuple(activations.shape)}: name a convolution, or set keep=None and maps=0"
            )
        if self.keep is None:
            return activations, batch.inputs
        wide = F.interpolate(relevance[:, None], batch.inputs.shape[-2:], mode="bilinear")[:, 0]
        least = wide.flatten(1).quantile(1 - self.keep, dim=1)[:, None, None]
        return activations, impute(batch.inputs, wide > least)

    def _scores(
        self, features: Mapping[str, Tensor], labels: Tensor, networks: list[str], pairs: list[tuple[str, str]]
    ) -> tuple[dict[str, float], Table]:
        centred = {name: u_centred(rows) for name, rows in features.items()}
        known = {name: centred[name] for name in networks}
        known |= {f"{x}|{y}": u_removed(centred[x], centred[y]) for x, y in pairs}
        classes = u_centred(self._embedded(labels))
        others = [u_centred(self._embedded(labels[torch.randperm(len(labels))])) for _ in range(PERMUTATIONS)]
        signed = torch.stack([u_correlation(p, classes) for p in known.values()])
        null = torch.stack([torch.stack([u_correlation(p, q).abs() for q in others]).mean() for p in known.values()])
        rows = {name: unit(features[name]) for name in networks}
        fss = {f"fss {n}": float(distance_correlation(rows[n], rows["teacher"])) for n in networks if n != "teacher"}
        deepest = centred["student"]
        numbers = fss | {f"rs {name}": float(value) for name, value in zip(known, signed, strict=True)}
        numbers |= {f"progression {path}": float(u_correlation(centred[path], deepest)) for path in self.progression}
        table = Table(tuple(known), ("signed", "absolute", "null"), torch.stack([signed, signed.abs(), null], dim=1))
        return numbers, table


def unicam(activations: Tensor, others: Tensor, embeddings: Tensor, size: Sequence[int]) -> Tensor:
    """Where each picture of a batch shows what one network knows about its class and another does not.

    Args:
        activations: of the one, `(batch, channels, h, w)`; others: features of the other, `(batch, ...)`, a constant.
        embeddings: of each sample's class, `(batch, width)`.
        size: height and width of the maps.

    Returns:
        `(batch, height, width)` in [0, 1]; all 0 where the one knows nothing that the other does not.

    Raises:
        InputError: all samples are of one class.
    """
    classes = u_centred(embeddings.to(activations.dtype))
    if u_product(classes, classes) <= 0:
        raise InputError("a batch of a single class has nothing to tell apart: mix classes in every batch")
    leaf = activations.detach().requires_grad_()
    with torch.enable_grad():
        left = u_removed(u_centred(leaf), u_centred(others.detach()))
        (gradient,) = torch.autograd.grad(u_correlation(left, classes), leaf)
    shown = (gradient.mean(dim=(2, 3), keepdim=True) * activations.detach()).sum(dim=1).relu()
    low, high = shown.amin(dim=(1, 2), keepdim=True), shown.amax(dim=(1, 2), keepdim=True)
    scaled = ((shown - low) / (high - low + 1e-7)).nan_to_num(0.0, 0.0, 0.0)
    return F.interpolate(scaled[:, None], list(size), mode="bilinear")[:, 0]


def hirescam(model: nn.Module, layer: str, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Activations of a layer, and which places of it speak for each sample's class: `relu(sum_c dlogit/dA_c A_c)`.

    Draelos and Carin, 2020, arXiv:2011.08891.

    Returns:
        `(batch, channels, h, w)` and `(batch, h, w)`.

    Raises:
        LayerError: there is no such layer.
        InputError: a label is none of the model's classes.
    """
    taps, held = Taps(model, [layer], inputs), []

    def hold(value: Tensor) -> Tensor:
        held.append(value.detach().requires_grad_())
        return held[0]

    try:
        with torch.enable_grad(), taps.open(swap={layer: hold}):
            logits = find_logits(call(model, inputs))
    finally:
        taps.remove()
    if labels.max() >= logits.shape[1]:
        raise InputError(
            f"the data has the label {int(labels.max())}, and a network tells {logits.shape[1]} classes apart"
        )
    (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), held[0])
    return held[0].detach(), (gradient * held[0].detach()).sum(dim=1).relu()


@torch.no_grad()
def _read(model: nn.Module, layers: list[str], inputs: Tensor) -> dict[str, Tensor]:
    taps = Taps(model, layers, inputs)
    try:
        with taps.open() as features:
            call(model, inputs)
    finally:
        taps.remove()
    return {layer: features[layer].float() for layer in layers}


def _fit(batch: Batch) -> bool:
    """Whether a batch has two classes with two samples each."""
    if batch.labels is None or (batch.labels < 0).any():
        raise InputError("UniCAM asks what is known about classes: every sample needs a label")
    return int((batch.labels.bincount() >= 2).sum()) >= 2

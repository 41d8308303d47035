"""The one shape that data has inside the library, whatever the user's data set yields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from transfuse.core.errors import InputError
from transfuse.losses.reduction import IGNORE, next_token

WELL_KNOWN = ("inputs", "labels", "index", "mask", "domain", "task")
LABEL_NAMES = ("labels", "label", "targets", "target", "y")


class Batch(dict[str, Any]):
    """A dict with attribute access and well-known keys; well-known keys that are absent read as None.

    Keys:
        inputs: what the model is called with: a tensor, or a mapping of keyword arguments.
        labels: `(batch,)`, `(batch, tokens)` or `(batch, height, width)` class ids; -100 is "not labelled".
        index: `(batch,)` ids in the root data set, through any `Subset`.
        mask: which positions of the logits count, for token-wise data; None counts all.
        domain, task: `(batch,)` ids where the data has several.
        source: inputs of the source's own, a mapping, where it reads the same samples in another form.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            if name in WELL_KNOWN:
                return None
            raise AttributeError(f"this batch has no {name!r}; it has: {', '.join(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    @property
    def size(self) -> int:
        """Number of samples."""
        for value in (self.inputs, *self.values()):
            for tensor in value.values() if isinstance(value, Mapping) else (value,):
                if isinstance(tensor, Tensor) and tensor.dim():
                    return tensor.shape[0]
        return 0

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; values that are not tensors stay."""
        return Batch(_map(self, lambda t: t.to(device, non_blocking=True)))

    def slice(self, start: int, stop: int) -> Batch:
        """The samples from `start` to `stop`."""
        return Batch(_map(self, lambda t: t[start:stop] if t.dim() else t))

    def take(self, rows: Tensor) -> Batch:
        """The samples of these rows, in their order."""
        return Batch(_map(self, lambda t: t[rows] if t.dim() else t))

    def for_source(self) -> Batch:
        """What the source reads: the same, unless the batch has inputs of its own for it, as `source`."""
        return Batch(self, inputs=self["source"]) if isinstance(self.get("source"), Mapping) else self

    def without_labels(self) -> Batch:
        """The same batch for those who must not see its labels."""
        return Batch({key: value for key, value in self.items() if key not in LABEL_NAMES})

    @classmethod
    def of(cls, item: Any) -> Batch:
        """Read what a data set or loader yields.

        Accepts a batch, a tensor (unlabelled inputs), `(inputs,)`, `(inputs, labels)`, a dataclass, or a
        mapping: with a key `inputs` it is taken as it is, otherwise (Hugging Face style) labels and
        well-known keys are taken out and the remaining tensors are the inputs.

        Raises:
            InputError: anything else; the message names the shapes that work.
        """
        if isinstance(item, Batch):
            return item
        if isinstance(item, Tensor):
            return cls(inputs=item)
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            item = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
        if isinstance(item, Mapping):
            return cls._of_mapping(item)
        if isinstance(item, Sequence) and not isinstance(item, str) and 1 <= len(item) <= 2:
            inputs, labels = item[0], (item[1] if len(item) == 2 else None)
            batch = cls._of_mapping(inputs) if isinstance(inputs, Mapping) else cls(inputs=inputs)
            return batch if labels is None else cls(batch, labels=labels)
        found = f"{type(item).__name__} of length {len(item)}" if isinstance(item, Sequence) else type(item).__name__
        raise InputError(
            f"cannot read a batch from a {found}: expected a tensor, (inputs, labels), or a mapping with "
            "'inputs' (and 'labels'); pass adapt=your_function to turn what your data yields into one of these"
        )

    @classmethod
    def _of_mapping(cls, item: Mapping[str, Any]) -> Batch:
        if "inputs" in item:
            return cls(item)
        names = [name for name in LABEL_NAMES if name in item]
        batch = cls({"labels": item[names[0]]} if names else {})
        rest = {k: v for k, v in item.items() if k not in names and isinstance(v, Tensor)}
        for name in ("index", "mask", "domain", "task"):
            if name in rest:
                batch[name] = rest.pop(name)
        if not rest:
            raise InputError(f"a batch with the keys {', '.join(item)} holds no input tensor")
        return cls(batch, inputs=rest)


def joined(batches: Sequence[Batch]) -> Batch:
    """The samples of several batches in one, with the keys that all of them have.

    Token sequences of different length are padded on the right; an `attention_mask` among the inputs then says so.

    Raises:
        InputError: inputs differ in their names or shapes, or tokens in length without a mask that could tell.
    """
    first = batches[0]
    keys = [key for key in first if all(key in batch for batch in batches)]
    return Batch({key: _joined(key, [batch[key] for batch in batches]) for key in keys})


def _joined(key: str, values: Sequence[Any]) -> Any:
    if isinstance(values[0], Mapping):
        names = [list(value) if isinstance(value, Mapping) else None for value in values]
        if any(found != names[0] for found in names):
            raise InputError(f"{key} of the pools are named differently: {', '.join(map(str, names))}")
        lengths = {value["input_ids"].shape[1] for value in values if "input_ids" in value}
        if len(lengths) > 1 and "attention_mask" not in values[0]:
            raise InputError(f"rows of {sorted(lengths)} tokens in one batch need an attention_mask that shows padding")
        return {name: _joined(name, [value[name] for value in values]) for name in values[0]}
    shapes = {value.shape[1:] for value in values}
    if len(shapes) > 1:
        # Only rows of tokens: an image of another size is no padded image.
        if any(len(shape) != 1 for shape in shapes) or values[0].is_floating_point() or key == "inputs":
            raise InputError(f"{key} differ in shape, {', '.join(map(str, map(tuple, shapes)))}: bring them to one")
        fill, length = (IGNORE if key == "labels" else 0), max(shape[0] for shape in shapes)
        values = [torch.nn.functional.pad(value, (0, length - value.shape[1]), value=fill) for value in values]
    return torch.cat(list(values))


def align_tokens(batch: Batch) -> Batch:
    """Line labels and mask up with the logits of a language model: position t is scored on token t + 1.

    Done once per batch, before any loss sees it, so no loss shifts. Labels come from the batch or, for
    unlabelled text, from the tokens; what an attention mask calls padding is never scored.
    """
    tokens = token_ids(batch)
    labels = tokens if batch.labels is None else batch.labels
    padding = padding_mask(batch)
    for mask in (padding, batch.mask):
        if mask is not None:
            labels = labels.masked_fill(~mask.bool(), IGNORE)
    labels = next_token(labels)
    if padding is not None:  # what a model says at padding on the left of a text means nothing
        labels = labels.masked_fill(~padding, IGNORE)
    return Batch(batch, labels=labels, mask=labels != IGNORE)


def line_up(batch: Batch, task: str) -> Batch:
    """Make labels and mask of a batch line up with the logits, as the task says; afterwards no loss has to."""
    if task == "language-model" and batch.inputs is not None:  # generated streams hold nothing to line up
        return align_tokens(batch)
    if task == "classification" or batch.labels is None or batch.mask is not None:
        return batch
    return Batch(batch, mask=batch.labels != IGNORE)


def token_ids(batch: Batch) -> Tensor:
    """The `(batch, tokens)` token ids of a batch.

    Raises:
        InputError: the inputs are not token ids.
    """
    tokens = batch.inputs.get("input_ids") if isinstance(batch.inputs, Mapping) else batch.inputs
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        raise InputError("a language model needs integer token ids of shape (batch, tokens) as inputs")
    return tokens


def padding_mask(batch: Batch) -> Tensor | None:
    """Which of the tokens that a batch holds as inputs are no padding, `(batch, tokens)` bool; None if nothing says."""
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, Mapping) else None
    # More dimensions say who may look at whom; such data says by its labels what counts.
    return None if mask is None or mask.dim() > 2 else mask.bool()


def real_tokens(batch: Batch) -> Tensor:
    """The same, where no mask means that there is no padding."""
    mask = padding_mask(batch)
    return torch.ones_like(token_ids(batch), dtype=torch.bool) if mask is None else mask


def _map(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: _map(v, change) for k, v in value.items()}
    return value

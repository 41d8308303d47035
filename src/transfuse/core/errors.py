"""What can go wrong, by name. A message says what was expected, what was found, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TransferError(Exception):
    """Any error that this library raises on purpose."""


class InputError(TransferError, ValueError):
    """The caller's data, recipe or arguments cannot be used as they are."""


class ShapeError(InputError):
    """Two tensors, models or label sets that must fit together do not."""


class VocabularyError(ShapeError):
    """Teacher and student count different classes or tokens."""


class LayerError(InputError):
    """A layer was named that the model does not have, or the name fits several."""


class CapabilityError(InputError):
    """A method needs something that its source cannot give."""


class MethodError(TransferError):
    """A method breaks its contract with the trainer (for authors of methods)."""


class DivergenceError(TransferError):
    """A loss or gradient is not finite."""


class StoreError(TransferError):
    """A file is missing, truncated, altered, unsafe to load, or could not be written."""


class MissingExtraError(TransferError, ImportError):
    """An optional dependency is needed."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f'{purpose} needs {package}, which is not installed: pip install "transfuse[{extra}]"')


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A hint for an unknown name: the closest known ones, or all of them when none is close and they are few."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if not close:
        close = [k for k in known if k.split(".")[-1] == name.split(".")[-1]][:count]
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    if not known:
        return "there are none."
    shown = ", ".join(known[:12]) + (f", ... ({len(known)} in all)" if len(known) > 12 else "")
    return f"known: {shown}."

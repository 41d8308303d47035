"""What a source can give, and the check that it is what a method needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.errors import CapabilityError, InputError, VocabularyError
from transfuse.core.outputs import Outputs
from transfuse.core.vocabulary import UNKNOWN
from transfuse.losses.scores import Target

GIVES = {"full", "features", "topk", "sampled", "text"}
"""Full logits, features of layers, top-k log-probabilities, sampled tokens, text."""


class LogitsTeacher(nn.Module):
    """A source that is only a function from inputs to logits: another framework, an exported graph, a table.

    It gives full logits and no features. What it returns is never differentiated.
    """

    gives = frozenset({"full"})

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.as_tensor(self.function(*args, **kwargs)).detach()


class Recorded(nn.Module):
    """A source whose answers were written down: it is asked by sample, and never run."""

    def read(self, batch: Batch) -> Outputs:
        """What the teacher said about the samples of a batch, on the batch's device.

        Raises:
            StoreError: there is no answer for one of them, or it was given to something else.
        """
        raise NotImplementedError


def as_teacher(source: Any) -> nn.Module:
    """A source as a module: modules as they are, other callables as a :class:`LogitsTeacher`.

    Raises:
        InputError: it is neither.
    """
    if isinstance(source, nn.Module):
        return source
    if callable(source):
        return LogitsTeacher(source)
    raise InputError(f"a source is a model or a function from inputs to logits, found a {type(source).__name__}")


def gives(source: nn.Module) -> frozenset[str]:
    """What a source can give: what it declares as `gives`, else full logits and features."""
    return frozenset(getattr(source, "gives", ("full", "features")))


def require(source: nn.Module, needs: Sequence[str], method: str, others: str) -> None:
    """Check that a source gives what a method needs.

    Args:
        needs: from `GIVES`, any one of which will do; what is not in there is no matter of a source's outputs.
        others: the methods that would work, for the message.

    Raises:
        CapabilityError: it does not.
    """
    if GIVES.issuperset(needs) and not gives(source).intersection(needs):
        raise CapabilityError(
            f"{method} needs {' or '.join(map(repr, needs))} from its source, {type(source).__name__} gives "
            f"{', '.join(sorted(gives(source)))}. "
            f"Methods that work with it: {others}"
        )


def same_classes(student: Target, teacher: Target) -> None:
    """Check that the scores of both sides speak of the same classes.

    Raises:
        VocabularyError: they count different ones.
    """
    axis = 1 if len(student.shape) == 4 else -1
    if student.shape[axis] != teacher.shape[axis]:
        found = (
            f"the target has {student.shape[axis]} classes (logits {tuple(student.shape)}), the source has "
            f"{teacher.shape[axis]} (logits {tuple(teacher.shape)})"
        )
        if len(student.shape) == 3:
            raise VocabularyError(f"{found}, and {UNKNOWN}")
        raise VocabularyError(
            f"{found}: logit methods need the same ones in the same "
            "order. Match features instead (Hints, AttentionTransfer, RKD), or give both the same head"
        )

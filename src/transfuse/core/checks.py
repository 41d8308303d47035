"""What must be true of a run, checked around its stages and updates; none of it moves anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch
from transfuse.core.errors import DivergenceError, MethodError
from transfuse.core.method import Method
from transfuse.core.phases import Stage


def parameter_names(method: Method, roles: Mapping[str, nn.Module]) -> dict[nn.Parameter, str]:
    """Every parameter of a run with a name for messages."""
    names = {p: f"method.{name}" for name, p in method.named_parameters()}
    for role, model in roles.items():
        names |= {p: f"{role}.{name}" for name, p in model.named_parameters()}
    return names


def require_phases(method: Method, number: int, stage: Stage, names: Mapping[nn.Parameter, str]) -> None:
    """Every side parameter that a stage must train is in one of its phases.

    Raises:
        MethodError: one is in none.
    """
    moved = {p for phase in stage.trained for p in phase.params}
    orphans = [names[p] for p in method.learns(number) if p.requires_grad and p not in moved]
    if orphans:
        raise MethodError(
            f"{type(method).__name__}: no phase of stage {number} trains {', '.join(orphans[:4])}. "
            "Put it into a phase, make it a buffer, or leave it out of learns()"
        )


def require_finite(modules: Iterable[nn.Module], consequence: str) -> None:
    """No parameter holds NaN or infinity, no buffer NaN (masks may well hold infinities).

    Raises:
        DivergenceError: one does; the message ends with the consequence.
    """
    for module in modules:
        broken = [n for n, p in module.named_parameters() if not p.isfinite().all()]
        broken += [n for n, b in module.named_buffers() if b.isnan().any()]
        if broken:
            raise DivergenceError(
                f"{broken[0]} is no longer finite {consequence} Lower the learning rate or clip gradients"
            )


def not_finite(micro: Sequence[Mapping[str, Batch]]) -> str | None:
    """Where the inputs of an update hold values that are not finite, in words; None where they do not."""
    for name, batch in ((n, b) for batches in micro for n, b in batches.items()):
        tensors = batch.inputs if isinstance(batch.inputs, Mapping) else {"inputs": batch.inputs}
        for key, tensor in tensors.items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
                rows = (~tensor.isfinite()).flatten(1).any(1).nonzero().flatten()
                ids = batch.index[rows.to(batch.index.device)] if batch.index is not None else rows
                return f"{key!r} of stream {name!r}, samples {ids[:5].tolist()}"
    return None


class Frozen:
    """Remembers the bits of every role, to notice one that moves without being meant to."""

    def __init__(self, roles: Mapping[str, nn.Module]):
        self._roles = roles
        self._before = {role: fingerprint(model) for role, model in roles.items()}

    def check(self, moving: Iterable[str]) -> None:
        """Compare all roles but those that may move.

        Raises:
            MethodError: one has moved: a resumed run would differ.
        """
        for role in self._before.keys() - set(moving):
            before, after = self._before[role], fingerprint(self._roles[role])
            if moved := [name for name in before if before[name] != after.get(name)]:
                raise MethodError(
                    f"the role {role!r} moved ({', '.join(moved[:3])}) although no phase trains it: a resumed run "
                    "would differ. Name it in the method's keeps if that is meant"
                )


def fingerprint(module: nn.Module) -> dict[str, int]:
    """A sum over the bits of every parameter and buffer that is in memory."""
    state = module.state_dict(keep_vars=True)
    return {name: _bits(t) for name, t in state.items() if isinstance(t, Tensor) and not t.is_meta}


def _bits(tensor: Tensor) -> int:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(whole).sum(dtype=torch.int64))

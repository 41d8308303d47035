"""Merging checkpoints tensor by tensor: read where they lie, computed in parallel, written where they belong.

Memory is bounded by the largest tensor, not by the models. Inputs: :mod:`transfuse.weights.folder`; what is checked
before: :mod:`transfuse.weights.ledger`; what lies beside the merged weights: :mod:`transfuse.weights.output`.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError, StoreError, VocabularyError, nearest
from transfuse.weights.checkpoint import Checkpoint, Spec, View
from transfuse.weights.folder import open_checkpoint
from transfuse.weights.ledger import Ledger, reconcile
from transfuse.weights.linear import Linear
from transfuse.weights.tokenizer_files import same_tokens
from transfuse.weights.vocabulary import Vocabulary, Which, align

if TYPE_CHECKING:
    from transfuse.weights.base import Merge

PIECE = 2**18
"""Entries that an elementwise method works on at once: as many as stay in a processor's cache."""
BESIDE = 2**27
"""Bytes for smaller tensors while a thread is busy with the largest."""
SHARD_SIZE = 5 * 2**30
"""Bytes of an output file at most, as Hugging Face has them."""
WORKERS = 2
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Merged:
    """What a merge gives back.

    Attributes:
        ledger: what stood against what.
        state: the merged tensors by name, tied names included; None where they were written to `folder`.
        model: a module with them, where the base or the first model is one.
        folder: where they were written to, or None.
        lost: where an adapter was written: the share of each tensor's change that is not in it, `""` for all together.
    """

    ledger: Ledger
    state: dict[str, Tensor] | None = None
    model: nn.Module | None = None
    folder: Path | None = None
    lost: dict[str, float] | None = None


def merge(
    method: Merge,
    models: Sequence[Any],
    base: Any = None,
    out: str | Path | None = None,
    *,
    dtype: str | None = None,
    vocabulary: Which | None = None,
    lora: int | None = None,
    shard_size: int = SHARD_SIZE,
    workers: int = WORKERS,
    resume: bool = False,
    force: bool = False,
    say: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Merge models that were trained from a common start.

    Args:
        method: for instance `TIES(density=0.3)`.
        models: what is merged: folders of Hugging Face's, safetensors files, modules or state dicts, in any mixture.
        base: their common ancestor, for methods that read it.
        out: a folder to write to, which `from_pretrained` loads; None keeps the merged tensors in memory.
        dtype: of the merged floating-point tensors, for instance `"bfloat16"`; by default each has the reference's (the
            base's, or the first model's). Everything is computed in float32.
        vocabulary: whose tokens the result has, where the models' tokenizers differ: `"base"` (or the first model's),
            `"union"` or `"intersection"`. Rows follow the bytes of their tokens.
        lora: write what the merge changes in the base as an adapter of this rank, which PEFT loads; embeddings, output
            layers and what is no matrix stay the base's. `Merged.lost` says what that costs.
        shard_size: bytes of an output file at most.
        workers: threads.
        resume: go on with a merge of the same things into `out` that was killed.
        force: merge models without a common ancestor, too.
        say: is told what it will take, before it begins.
        progress: called with the bytes that are done, and all of them.

    Raises:
        InputError: the models do not fit each other or the method, a parent holds NaN, or `out` is taken.
        StoreError: a file is damaged, or there is not enough room; nothing half-written is left under the name `out`.
    """
    plan = Plan.of(method, models, base, dtype, force, vocabulary)
    if lora is not None:
        return _adapter(plan, lora, out, progress)
    if out is not None:
        from transfuse.weights.output import write  # it stands on this module

        folder = write(plan, Path(out), shard_size, workers, resume, say, progress)
        return Merged(plan.ledger, folder=folder)
    state: dict[str, Tensor] = {}

    def keep(key: str, pieces: Iterator[Tensor]) -> None:
        state[key] = whole(plan.specs[key], pieces)

    plan.run(keep, plan.specs, workers, progress)
    state = {key: state[key] for key in plan.specs} | {k: state[owner] for k, owner in plan.ledger.tied.items()}
    given = next((m for m in (base, *models) if m is not None), None)
    if not isinstance(given, nn.Module):
        return Merged(plan.ledger, state)
    model = copy.deepcopy(given)
    model.load_state_dict(state)
    return Merged(plan.ledger, state, model)


@dataclass(frozen=True)
class Plan:
    """A merge that is known to be possible.

    Attributes:
        specs: of every merged tensor, in the order in which they are written; tied names are not among them.
    """

    method: Merge
    base: Checkpoint | None
    models: Sequence[Checkpoint]
    ledger: Ledger
    specs: Mapping[str, Spec]
    vocabulary: Vocabulary | None = None

    @classmethod
    def of(
        cls,
        method: Merge,
        models: Sequence[Any],
        base: Any,
        dtype: str | None = None,
        force: bool = False,
        vocabulary: Which | None = None,
    ) -> Plan:
        """Open everything and check that it fits."""
        name = type(method).__name__
        if dtype is not None and dtype not in FLOATS:
            raise InputError(f"unknown dtype {dtype!r}: {nearest(dtype, FLOATS)}")
        if not models:
            raise InputError("there is nothing to merge: pass at least one model")
        if method.exactly is not None and len(models) != method.exactly:
            raise InputError(f"{name} merges {method.exactly} models, found {len(models)}")
        if method.needs_base and base is None:
            raise InputError(f"{name} reads what models have learned since their common ancestor: pass base=...")
        opened = [_opened(model, f"model {i}") for i, model in enumerate(models)]
        ancestor = None if base is None else _opened(base, "base")
        parents = [*opened, *(() if ancestor is None else (ancestor,))]
        tokens = None
        if vocabulary is not None:
            ancestor, opened, tokens = align(ancestor, opened, vocabulary)
        elif same_tokens(parents) is False:
            raise VocabularyError(
                "the tokenizers of these models give different ids, so rows of one number mean different tokens: say "
                "whose tokens the merge shall have, vocabulary='base', 'union' or 'intersection'"
            )
        reference = opened[0] if ancestor is None else ancestor
        ledger = reconcile(ancestor, opened, force)
        floating = FLOATS[dtype] if dtype else None
        specs = {
            key: Spec(spec.shape, floating if floating and spec.dtype.is_floating_point else spec.dtype)
            for key, spec in reference.tensors.items()
        }
        for pattern in method.unknown_patterns(reference.names):
            raise InputError(f"{name}: the pattern {pattern!r} fits no tensor; {nearest(pattern, reference.names)}")
        depths = depths_of(reference)
        for key in ledger.merged:  # tensors that no pattern fits, and numbers that are out of range
            method.at(key, depths[key])
        return cls(method, ancestor, opened, ledger, specs, tokens)

    @property
    def reference(self) -> Checkpoint:
        """The parent that says which tensors there are."""
        return self.models[0] if self.base is None else self.base

    @property
    def bytes(self) -> int:
        """Of all merged tensors."""
        return sum(spec.bytes for spec in self.specs.values())

    def memory(self, workers: int = WORKERS) -> int:
        """Bytes beside the mapped files: every model's, the base's and the merged copy of the largest tensor.

        Of a piece of it for every worker, where a method needs no more at once.
        """
        copies = 4 * (len(self.models) + 2)
        if self.method.elementwise:
            return copies * workers * PIECE
        largest = max((torch.Size(spec.shape).numel() for spec in self.specs.values()), default=0)
        return copies * largest + (BESIDE if workers > 1 else 0)

    def pieces(self, key: str) -> Iterator[Tensor]:
        """The merged tensor of a name, flat, in order, in one piece or several, in its type.

        Raises:
            InputError: a parent's tensor holds NaN or infinity.
        """
        spec, role = self.specs[key], self._roles.get(key, "merged")
        if role == "kept":
            yield self.reference.read(key).flatten()
            return
        method = Linear() if role == "averaged" else self.method.at(key, self._depths[key])
        tensors = [_read(model, key) for model in self.models]
        ancestor = None if self.base is None else _read(self.base, key)
        if method.elementwise:
            tensors = [t.flatten() for t in tensors]
            ancestor = None if ancestor is None else ancestor.flatten()
        step = PIECE if method.elementwise else max(1, tensors[0].numel())
        for start in range(0, max(1, len(tensors[0]) if method.elementwise else 1), step):
            at = slice(start, start + step) if method.elementwise else ...
            merged = method.merge(
                key, None if ancestor is None else ancestor[at].float(), [t[at].float() for t in tensors]
            )
            if not bool(merged.sum().isfinite()) and not bool(merged.isfinite().all()):
                raise InputError(self._blame(key))
            yield merged.flatten().to(spec.dtype)

    def run(
        self,
        take: Callable[[str, Iterator[Tensor]], None],
        keys: Mapping[str, Spec],
        workers: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Hand the pieces of every tensor to `take`, several tensors at a time but never more than memory allows."""
        budget, done, lock = _Budget(self.memory(workers)), 0, threading.Lock()
        total = sum(spec.bytes for spec in keys.values())

        def one(key: str) -> None:
            nonlocal done
            size = torch.Size(keys[key].shape).numel()
            with budget.spend((len(self.models) + 2) * 4 * (min(size, PIECE) if self.method.elementwise else size)):
                take(key, self.pieces(key))
            with lock:
                done += keys[key].bytes
                if progress:
                    progress(done, total)

        # The largest first, so that no thread is left with one at the end.
        order = sorted(keys, key=lambda k: -keys[k].bytes)
        with ThreadPoolExecutor(max(1, workers), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = [pool.submit(one, key) for key in order]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    @cached_property
    def _roles(self) -> dict[str, str]:
        return dict.fromkeys(self.ledger.averaged, "averaged") | dict.fromkeys(self.ledger.kept, "kept")

    @cached_property
    def _depths(self) -> dict[str, float]:
        return depths_of(self.reference)

    def _blame(self, key: str) -> str:
        for parent in (*self.models, *(() if self.base is None else (self.base,))):
            if not bool(_read(parent, key).isfinite().all()):
                return f"{key!r} in {parent.name} holds NaN or infinity: that model is damaged, leave it out"
        return (
            f"{key!r} of the merge holds NaN or infinity, its parents do not: look at the arguments of {self.method!r}"
        )


class _Budget:
    """Bytes that threads share; who would need more than there are left waits, unless nobody holds any."""

    def __init__(self, limit: int):
        self.limit, self._used, self._changed = limit, 0, threading.Condition()

    @contextmanager
    def spend(self, size: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + size <= self.limit)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


class _Merged(View):
    """What a plan merges, as a checkpoint: every tensor is merged when it is read."""

    def __init__(self, plan: Plan):
        super().__init__(plan.reference)
        self.plan, self.name = plan, "the merge"

    def read(self, key: str) -> Tensor:
        return whole(self.plan.specs[key], self.plan.pieces(key))


def _adapter(plan: Plan, rank: int, out: str | Path | None, progress: Callable[[int, int], None] | None) -> Merged:
    from transfuse.weights.lora import extract_lora
    from transfuse.weights.output import require_new

    if plan.base is None or out is None:
        raise InputError(
            "an adapter is written to a folder, and says what changes in a base: pass base=... and out=..."
        )
    if plan.base.tensors != plan.specs:
        raise InputError("an adapter has the tokens and the types of its base: leave out vocabulary and dtype")
    require_new(Path(out))
    lost = extract_lora(plan.base, _Merged(plan), rank, out, progress=progress)
    return Merged(plan.ledger, folder=Path(out), lost=lost)


def whole(spec: Spec, pieces: Iterator[Tensor]) -> Tensor:
    """The tensor of which these are the pieces, one after the other.

    Raises:
        StoreError: they are more or fewer than fit.
    """
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    flat, at = tensor.view(-1), 0
    for piece in pieces:
        if at + len(piece) > len(flat):
            break
        flat[at : at + len(piece)] = piece
        at += len(piece)
    if at != len(flat):
        raise StoreError(f"a merged tensor has {at} entries or more, {len(flat)} were expected")
    return tensor


def depths_of(checkpoint: Checkpoint) -> dict[str, float]:
    """Where in the network every tensor is, from 0 in the first numbered layer to 1 in the last.

    What is in no layer, embeddings, the last norm, the head, counts as 0, as it does for mergekit: its place among the
    names says nothing, for files sort them.
    """
    numbers = {key: int(found[1]) for key in checkpoint.tensors if (found := re.search(r"\.(\d+)\.", key))}
    last = max(numbers.values(), default=0)
    return {key: numbers.get(key, 0) / last if last else 0.0 for key in checkpoint.tensors}


def _read(parent: Checkpoint, key: str) -> Tensor:
    """A tensor, or the one that it is tied to."""
    return parent.read(parent.tied.get(key, key))


def _opened(source: Any, name: str) -> Checkpoint:
    """A checkpoint; what is no file has no name of its own."""
    return open_checkpoint(source, None if isinstance(source, str | Path) else name)

"""Low-rank adapters in PEFT's format as weights: folded in, extracted, merged. Deltas are combined, never factors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from transfuse.core.checkpoint import read_pickle, read_tensors
from transfuse.core.errors import CapabilityError, InputError, StoreError, nearest
from transfuse.core.files import make_folder, temporary, write_atomically
from transfuse.weights.checkpoint import Checkpoint, View

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
OVERSAMPLED, EXACT = 16, 1024
"""Directions that a randomised SVD looks at beyond the rank, and the side up to which the exact one is taken."""


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one weight: `scale * b @ a`, `(out, in)` as the layer has it.

    Attributes:
        a, b: `(rank, in)` and `(out, rank)`, float32.
        turned: whether the weight is kept as `(in, out)`.
    """

    a: Tensor
    b: Tensor
    scale: float
    turned: bool = False

    def dense(self, shape: Sequence[int]) -> Tensor:
        """In the shape of the weight."""
        product = (self.b @ self.a).mul_(self.scale)
        return (product.T if self.turned else product).reshape(tuple(shape))


class Adapter:
    """A LoRA adapter.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`, as PEFT saves it.

    Raises:
        StoreError: a file is missing or damaged.
        CapabilityError: it is of a kind whose sum with a weight is not defined by the adapter alone (DoRA, ...).
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = _config(self.folder)
        self.deltas: dict[str, Delta] = {}
        self.replaced: dict[str, Tensor] = {}
        for name in ("use_dora", "lora_bias", "use_qalora"):
            if self.config.get(name):
                raise CapabilityError(
                    f"{self.folder} has {name}, which is more than a sum of weights: merge it with PEFT"
                )
        tensors = _tensors(self.folder)
        for key, value in tensors.items():
            name = key.removeprefix(PREFIX)
            if found := re.fullmatch(r"(.*)\.lora_(embedding_)?A(?:\.weight)?", name):
                kind = found[2] or ""
                other = f"{PREFIX}{found[1]}.lora_{kind}B" + ("" if kind else ".weight")
                if other not in tensors:
                    raise StoreError(f"{self.folder} has {key} and no {other}")
                self.deltas[f"{found[1]}.weight"] = self._delta(found[1], value, tensors[other], bool(kind))
            elif not re.search(r"\.lora_(embedding_)?B(\.weight)?$", name):
                if ".lora_" in name:
                    raise CapabilityError(
                        f"{self.folder} has {key}, which is no part of a plain LoRA: merge it with PEFT"
                    )
                self.replaced[name.replace(".base_layer.", ".")] = value

    def shape(self, key: str) -> tuple[int, int]:
        """Rows of a weight that is changed, and entries of each."""
        if key in self.replaced:
            return len(self.replaced[key]), self.replaced[key][0].numel()
        delta = self.deltas[key]
        rows, columns = delta.b.shape[0], delta.a.shape[1]
        return (columns, rows) if delta.turned else (rows, columns)

    def _delta(self, module: str, a: Tensor, b: Tensor, embedding: bool) -> Delta:
        rank = self._of_module("rank_pattern", module, self.config["r"])
        alpha = self._of_module("alpha_pattern", module, self.config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return Delta(
            a.float().flatten(1), b.float().flatten(1), scale, embedding or bool(self.config.get("fan_in_fan_out"))
        )

    def _of_module(self, name: str, module: str, default: float) -> float:
        for pattern, value in (self.config.get(name) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return float(default)


class WithAdapter(View):
    """A checkpoint with an adapter folded in, weight by weight as they are read.

    Raises:
        InputError: the adapter speaks of weights that the checkpoint has not, or of other shapes.
        CapabilityError: a weight that it changes is quantised.
    """

    def __init__(self, inner: Checkpoint, adapter: Adapter | str | Path):
        super().__init__(inner)
        self.adapter = adapter if isinstance(adapter, Adapter) else Adapter(adapter)
        self.name = f"{inner.name}+{self.adapter.folder}"
        for key in (*self.adapter.deltas, *self.adapter.replaced):
            if key in inner.tied:
                raise InputError(
                    f"{self.adapter.folder} changes {key!r}, which is tied to {inner.tied[key]!r}: untie it first"
                )
            if key not in inner.tensors:
                raise InputError(
                    f"{self.adapter.folder} speaks of {key!r}, {inner.name} has {nearest(key, inner.tensors)}"
                )
            spec = inner.tensors[key]
            if not spec.dtype.is_floating_point:
                raise CapabilityError(
                    f"{key!r} of {inner.name} is quantised ({str(spec.dtype).removeprefix('torch.')}), and nothing can "
                    "be added to its codes: fold the adapter into the model in 16 bits, and quantise that"
                )
            given = self.adapter.shape(key)
            if (spec.shape[0], torch.Size(spec.shape[1:]).numel()) != given:
                raise InputError(f"{self.adapter.folder} changes {key!r} as {given}, {inner.name} has {spec.shape}")

    def read(self, key: str) -> Tensor:
        tensor = self.adapter.replaced[key] if key in self.adapter.replaced else self.inner.read(key)
        if key not in self.adapter.deltas:
            return tensor
        return (tensor.float() + self.adapter.deltas[key].dense(tensor.shape)).to(tensor.dtype)


def extract_lora(
    base: Checkpoint,
    tuned: Checkpoint,
    rank: int,
    out: str | Path,
    keep: Callable[[str], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Write what a model has learned since its base as an adapter of PEFT's, of the best low rank.

    Args:
        rank: of every weight's delta.
        keep: which matrices get an adapter, by name; by default all but embeddings and output layers. What has no
            adapter must be as in the base, or it is left out and counted in the error.
        progress: called with the bytes that are done, and all of them.

    Returns:
        For each changed tensor, the share of its delta's norm that is not in the adapter; 0 is exact. `""` has that of
        all together.

    Raises:
        InputError: rank is below 1, or nothing has changed.
    """
    if rank < 1:
        raise InputError(f"rank is {rank}, it must be at least 1")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    lost: dict[str, float] = {}
    missing = whole = 0.0
    total, done = sum(spec.bytes for spec in base.tensors.values()), 0
    for key, spec in base.tensors.items():
        if progress:
            progress(done := done + spec.bytes, total)
        delta = tuned.read(tuned.tied.get(key, key)).float() - base.read(key).float()
        norm = float(delta.norm())
        if not spec.dtype.is_floating_point or norm == 0:
            continue
        whole += norm**2
        wanted = keep(key) if keep else not any(part in key for part in ("embed", "head", "wte"))
        left = norm
        if len(spec.shape) == 2 and key.endswith(".weight") and wanted:
            factors[key.removesuffix(".weight")] = b, a = low_rank(delta, rank)
            left = float((delta - b @ a).norm())
        lost[key] = left / norm
        missing += left**2
    if not factors:
        raise InputError(f"{tuned.name} and {base.name} differ in no matrix that an adapter could change")
    save_adapter(out, factors, rank, base.name)
    return {"": math.sqrt(missing / whole), **lost}


def merge_adapters(
    adapters: Sequence[Adapter | str | Path], weights: Sequence[float], out: str | Path, rank: int | None = None
) -> dict[str, float]:
    """Add adapters of one base, weighted, into one adapter: the deltas are added, then cut to a rank.

    Args:
        rank: of the result; by default the sum of the ranks, which is exact.

    Returns:
        For each weight, the share of the summed delta's norm that is lost.

    Raises:
        InputError: not one weight per adapter, or adapters that replace whole modules.
    """
    if len(weights) != len(adapters) or not adapters:
        raise InputError(f"there are {len(weights)} weights for {len(adapters)} adapters")
    opened = [adapter if isinstance(adapter, Adapter) else Adapter(adapter) for adapter in adapters]
    if replaced := [adapter for adapter in opened if adapter.replaced]:
        raise InputError(
            f"{replaced[0].folder} also replaces {next(iter(replaced[0].replaced))!r}: fold it into its base"
        )
    full = rank or sum(int(max(d.a.shape[0] for d in adapter.deltas.values())) for adapter in opened)
    factors, lost = {}, {}
    for key in dict.fromkeys(key for adapter in opened for key in adapter.deltas):
        parts = [(w, adapter.deltas[key]) for w, adapter in zip(weights, opened, strict=True) if key in adapter.deltas]
        if any(delta.turned for _, delta in parts):
            raise InputError(f"{key!r} is kept as (in, out), which is folded in but not merged: fold the adapters in")
        b = torch.cat([delta.b * (w * delta.scale) for w, delta in parts], 1)
        a = torch.cat([delta.a for _, delta in parts])
        # The SVD of a product from the small triangles of its factors.
        qb, rb = torch.linalg.qr(b)
        qa, ra = torch.linalg.qr(a.T)
        u, s, v = torch.linalg.svd(rb @ ra.T)
        cut = min(full, len(s))
        root = s[:cut].sqrt()
        ours_b, ours_a = _padded(qb @ u[:, :cut] * root, full, 1), _padded((v[:cut].T * root).T @ qa.T, full, 0)
        factors[key.removesuffix(".weight")] = ours_b, ours_a
        lost[key] = float(s[cut:].norm() / s.norm()) if float(s.norm()) else 0.0
    save_adapter(out, factors, full, opened[0].config.get("base_model_name_or_path"))
    return lost


def low_rank(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of a rank, `(out, rank)` and `(rank, in)`, float32; of large matrices from a randomised SVD."""
    if min(delta.shape) <= EXACT or rank + OVERSAMPLED >= min(delta.shape):
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, right = torch.svd_lowrank(delta, rank + OVERSAMPLED, niter=4)
        v = right.T
    root = s[:rank].sqrt()
    return _padded(u[:, :rank] * root, rank, 1), _padded(root[:, None] * v[:rank], rank, 0)


def save_adapter(out: str | Path, factors: Mapping[str, tuple[Tensor, Tensor]], rank: int, base: str | None) -> None:
    """Write factors `b, a` of every module as an adapter that `PeftModel.from_pretrained` loads; its scale is 1."""
    folder = Path(out)
    make_folder(folder)
    tensors = {}
    for module, (b, a) in factors.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.contiguous()
    with temporary(folder / WEIGHTS) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(factors),
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _padded(matrix: Tensor, size: int, dim: int) -> Tensor:
    """Zeros up to a size, where a matrix has a lower rank than asked for."""
    lacking = size - matrix.shape[dim]
    if lacking <= 0:
        return matrix
    shape = list(matrix.shape)
    shape[dim] = lacking
    return torch.cat([matrix, matrix.new_zeros(shape)], dim)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"there is no adapter in {folder}: {error}") from None
    if config.get("peft_type") != "LORA":
        raise CapabilityError(f"{folder} is a {config.get('peft_type')} adapter; LoRA alone is a sum of weights")
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).exists():
        return read_tensors(folder / WEIGHTS)[0]
    if (folder / "adapter_model.bin").exists():
        return read_pickle(folder / "adapter_model.bin")
    raise StoreError(f"{folder} has no {WEIGHTS}")

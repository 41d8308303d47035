"""Skill packs: a fine-tuned model's change, compressed, that can be put on its base and taken off again."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from transfuse.core.checkpoint import load_state, save_state
from transfuse.core.errors import InputError, StoreError, nearest
from transfuse.core.outputs import find_logits
from transfuse.weights.factors import Factors
from transfuse.weights.gptq import Quantised, check_bits, gptq

Plan = Sequence[tuple[float, int]]
"""Groups of singular values, the largest first: what share of them, and in how many bits."""


class SkillPack:
    """A change of some parameters of one base.

        W = W_base + sum over groups g of U_g diag(s_g) V_g^T

    Attributes:
        tensors: as stored, by `"<parameter>|<group>|u/codes"`, ..., with `"<parameter>|turned"` where a layer keeps its
            weight as `(in, out)`; other parameters have `"<parameter>|values"`, and `"<parameter>|index"` where only
            some entries change. Dots in names are slashes.
        base: fingerprint of the base.
        config: how it was made.
    """

    def __init__(self, tensors: Mapping[str, Tensor], base: str, config: Mapping[str, Any] | None = None):
        self.tensors, self.base, self.config = dict(tensors), base, dict(config or {})

    @property
    def blocks(self) -> list[str]:
        """The parameters that it changes."""
        return list(dict.fromkeys(key.split("|")[0].replace("/", ".") for key in self.tensors))

    @property
    def bits(self) -> int:
        """What it takes to store: every array that is kept."""
        return sum(8 * t.numel() * t.element_size() for t in self.tensors.values())

    def change(self, block: str, like: Tensor) -> Tensor:
        """What it adds to one parameter, float32, in the shape of `like`."""
        key = block.replace(".", "/")
        if f"{key}|values" in self.tensors:
            values = self.tensors[f"{key}|values"].float().to(like.device)
            if f"{key}|index" not in self.tensors:
                return values.view(like.shape)
            index = self.tensors[f"{key}|index"].long().to(like.device)
            return torch.zeros(like.numel(), device=like.device).scatter(0, index, values).view(like.shape)
        turned = f"{key}|turned" in self.tensors
        total = torch.zeros(like.T.shape if turned else like.shape, device=like.device)
        number = 0
        while (prefix := f"{key}|{number}|") + "s" in self.tensors:
            u, v = (Quantised.read(self.tensors, f"{prefix}{n}/").dense() for n in "uv")
            total += ((u * self.tensors[prefix + "s"].float()) @ v).to(like.device).view(total.shape)
            number += 1
        return total.T if turned else total

    def require(self, model: nn.Module) -> None:
        """Check that a model is the base it was made for.

        Raises:
            InputError: it is another one.
        """
        if fingerprint(model) != self.base:
            raise InputError(
                "this skill pack belongs to another base: attach it to the very weights that it was made with"
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        save_state(Path(path), {"skill pack": 1, "tensors": self.tensors, "base": self.base, "config": self.config})

    @classmethod
    def load(cls, path: str | Path) -> SkillPack:
        """Read what :meth:`save` wrote.

        Raises:
            StoreError: the file is missing, altered, or no skill pack.
        """
        state = load_state(Path(path))
        if not isinstance(state, dict) or state.get("skill pack") != 1:
            raise StoreError(f"{path} holds no skill pack")
        return cls(state["tensors"], state["base"], state["config"])


def compressed(factors: Factors, gram: Tensor, plan: Plan, **options: Any) -> dict[str, Tensor]:
    """The factors of one matrix `(out, in)` in groups of different precision, as a pack stores them.

    In every group V is rounded for the layer's inputs x, then U for what it gets, diag(s) V^T x.

    Args:
        gram: sum of x x^T, `(in, in)`.
        options: of :func:`~transfuse.weights.gptq.gptq`.
    """
    found: dict[str, Tensor] = {}
    for number, (begin, end, bits) in enumerate(planned(factors.terms, plan)):
        part = factors.take(slice(begin, end))
        v = gptq(part.v.mT, gram, bits, **options)
        s = part.s if bits == 32 else part.s.half()  # singular values are few, and rounding them does harm
        turned = v.dense() * s.float()[:, None]
        u = gptq(part.u, turned @ gram.float() @ turned.mT, bits, **options)
        found |= {f"{number}|s": s, **u.tensors(f"{number}|u/"), **v.tensors(f"{number}|v/")}
    return found


def planned(terms: int, plan: Plan) -> list[tuple[int, int, int]]:
    """Where the groups of so many terms begin and end, and their bits; groups without a term are left out.

    Raises:
        InputError: shares are not positive or do not sum to one, or a number of bits is unknown.
    """
    shares = [share for share, _ in plan]
    if not shares or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise InputError(f"groups are shares of the singular values that sum to 1, found {shares}")
    found, begin, share_done = [], 0, 0.0
    for share, bits in plan:
        check_bits(bits)
        share_done += share
        end = min(terms, max(begin + 1, round(share_done * terms)))
        if end > begin:
            found.append((begin, end, bits))
        begin = end
    return found


def fingerprint(model: nn.Module) -> str:
    """A hash over the names and bits of all parameters and buffers."""
    whole = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:32]


class Grafts:
    """Skill packs on a live model. Its own weights are kept beside, so that taking packs off restores every bit."""

    def __init__(self, model: nn.Module):
        self.model, self.base = model, fingerprint(model)
        self.attached: dict[str, SkillPack] = {}
        self._pristine: dict[str, Tensor] = {}

    def attach(self, name: str, pack: SkillPack) -> None:
        """Put a pack on.

        Raises:
            InputError: the pack belongs to another base, or the name is taken.
        """
        if pack.base != self.base:
            raise InputError(f"{name!r} is a skill pack of another base ({pack.base}), this model is {self.base}")
        if name in self.attached:
            raise InputError(f"a skill pack {name!r} is attached already: detach it first")
        self.attached[name] = pack
        self._write(pack.blocks)

    def detach(self, name: str) -> None:
        """Take a pack off.

        Raises:
            InputError: none of this name is attached.
        """
        if name not in self.attached:
            raise InputError(f"no skill pack {name!r} is attached: {nearest(name, self.attached)}")
        self._write(self.attached.pop(name).blocks)

    def only(self, name: str, pack: SkillPack) -> None:
        """Put a pack on in the place of all others: explicit routing, by the type of the task."""
        for other in list(self.attached):
            self.detach(other)
        self.attach(name, pack)

    @torch.no_grad()
    def _write(self, blocks: Sequence[str]) -> None:
        own = dict(self.model.named_parameters())
        for block in blocks:
            pristine = self._pristine.setdefault(block, own[block].detach().clone())
            changes = [p.change(block, pristine) for p in self.attached.values() if block in p.blocks]
            value = sum(changes, start=pristine.float()) if changes else pristine
            own[block].copy_(value.to(pristine.dtype))


class Router(nn.Module):
    """Chooses a pack for every text: the mean of its tokens' embeddings through a small perceptron.

    Train it like any classifier, on `(tokens, number of the pack)`: `transfer(Labels(), target=Router(256, 3), ...)`.
    """

    def __init__(self, vocabulary: int, packs: int, hidden: int = 32):
        super().__init__()
        self.embed = nn.EmbeddingBag(vocabulary, hidden, mode="mean")
        self.classify = nn.Sequential(nn.ReLU(), nn.Linear(hidden, packs))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits `(batch, packs)` of tokens `(batch, tokens)`."""
        if attention_mask is None:
            return self.classify(self.embed(input_ids))
        weight = attention_mask / attention_mask.sum(1, keepdim=True).clamp(min=1)
        return self.classify((self.embed.weight[input_ids] * weight[..., None]).sum(1))


class Routed(nn.Module):
    """A base that answers every text with one of its packs, chosen by a router, or by the number of the task.

    Args:
        base: is copied. packs: by name, numbered in their order. router: tokens to logits `(batch, packs)`; None where
            the task is always given.

    Raises:
        InputError: a pack belongs to another base; (in the forward pass) there is neither a task nor a router.
    """

    def __init__(self, base: nn.Module, packs: Mapping[str, SkillPack], router: nn.Module | None = None):
        super().__init__()
        for pack in packs.values():
            pack.require(base)
        self.base, self.packs, self.router = copy.deepcopy(base), dict(packs), router

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, task: int | None = None) -> Tensor:
        """Logits `(batch, tokens, vocabulary)`."""
        if task is None and self.router is None:
            raise InputError("which pack shall answer? Give the number of the task, or build it with a router")
        inputs = {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
        chosen = torch.full((len(input_ids),), task) if task is not None else self._routed(inputs)
        logits: Tensor | None = None
        for number, pack in enumerate(self.packs.values()):
            rows = (chosen == number).nonzero().flatten()
            if not len(rows):
                continue
            own = dict(self.base.named_parameters())
            params = {b: (own[b].float() + pack.change(b, own[b])).to(own[b].dtype) for b in pack.blocks}
            part = find_logits(functional_call(self.base, params, (), {k: v[rows] for k, v in inputs.items()}))
            logits = part.new_zeros(len(input_ids), *part.shape[1:]) if logits is None else logits
            logits = logits.index_copy(0, rows, part)
        if logits is None:
            raise InputError(f"there is no pack number {task}: there are {len(self.packs)}")
        return logits

    def _routed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        assert self.router is not None
        return self.router(**inputs).argmax(-1)

"""Writing text token by token: with one model, or with several whose logits are put together at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch, align_tokens
from transfuse.core.errors import InputError
from transfuse.core.outputs import _accepts, call, find_logits, full_precision, modes_kept
from transfuse.losses.supervised import cross_entropy

Fuse = Callable[[list[Tensor]], Tensor]
"""From the logits of every model, `(batch, vocabulary)`, to those that are drawn from."""


@torch.no_grad()
def generate(
    models: nn.Module | Sequence[nn.Module],
    tokens: Tensor,
    *,
    new_tokens: int,
    mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end: int | None = None,
    generator: torch.Generator | None = None,
    fuse: Fuse | None = None,
    each: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue prompts; `(batch, n)` becomes `(batch, n + new_tokens)`, or less where every row has ended.

    Hugging Face models keep what they have computed (a KV cache); others read the whole text at every step, or its last
    `model.context` tokens. Models are in eval mode meanwhile.

    Args:
        models: one, or several that read the same tokens, with `fuse`.
        tokens: `(batch, n)` ids; shorter prompts are padded on the left.
        mask: `(batch, n)`, 0 at padding; None for none.
        temperature: divides the logits; 0 takes the most likely token.
        top_k, top_p: draw among the k most likely tokens; among the fewest that hold this share of the mass.
        end: a row is finished with this token, and filled up with it.
        generator: of what is drawn; None takes torch's own.
        each: called with every new column, `(batch,)`, for showing text while it is written.

    Raises:
        InputError: an empty prompt, one that is padded on the right, or an argument out of range.
    """
    several = list(models) if isinstance(models, Sequence) else [models]
    if (fuse is None) != (len(several) == 1):
        needs = "one model needs no fuse" if fuse else f"{len(several)} models need a function fuse for their logits"
        raise InputError(f"{needs}: give several models and fuse, or one model")
    _require(tokens, mask, new_tokens, temperature, top_k, top_p)
    real = torch.ones_like(tokens) if mask is None else mask.long()
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    with modes_kept(*several):
        readers = [Reader(model.eval(), mask is not None) for model in several]
        for _ in range(new_tokens):
            logits = [reader(tokens, real) for reader in readers]
            chosen = choose(fuse(logits) if fuse else logits[0], temperature, top_k, top_p, generator)
            if end is not None:
                chosen = chosen.masked_fill(ended, end)
                ended |= chosen == end
            tokens, real = (
                torch.cat([a, b[:, None]], 1) for a, b in ((tokens, chosen), (real, torch.ones_like(chosen)))
            )
            if each:
                each(chosen)
            if ended.all():
                break
    return tokens


class Reader:
    """One model that reads a growing text and says what comes next."""

    def __init__(self, model: nn.Module, padded: bool):
        self.model, self.padded = model, padded
        self.caches = hasattr(model, "config") and getattr(model.config, "use_cache", None) is not None
        self.cache: Any = None
        self.read = 0

    def __call__(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Logits `(batch, vocabulary)` after the last token; the text is that of the last call, and more."""
        if not self.caches:
            context = getattr(self.model, "context", None) or tokens.shape[1]
            return full_precision(find_logits(self._whole(tokens[:, -context:], real[:, -context:])))[:, -1]
        positions = (real.cumsum(1) - 1).clamp(min=0)
        given = {"attention_mask": real, "position_ids": positions[:, self.read :], "past_key_values": self.cache}
        outputs = self.model(input_ids=tokens[:, self.read :], use_cache=True, **given)
        self.cache, self.read = outputs.past_key_values, tokens.shape[1]
        return full_precision(outputs.logits)[:, -1]

    def _whole(self, tokens: Tensor, real: Tensor) -> Any:
        if _accepts(type(self.model).forward, "attention_mask"):
            return call(self.model, {"input_ids": tokens, "attention_mask": real})
        if self.padded:
            raise InputError(
                f"{type(self.model).__name__} has no attention_mask, so it cannot tell padding from text: give prompts "
                "of one length, or one at a time"
            )
        return call(self.model, tokens)


def choose(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token of each row of logits `(batch, vocabulary)`, `(batch,)`; arguments as in :func:`generate`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        logits = logits.masked_fill((before >= top_p).gather(-1, order.argsort(-1)), -torch.inf)
    return logits.softmax(-1).multinomial(1, generator=generator)[:, 0]


@torch.no_grad()
def sequence_log_probability(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor | None = None) -> Tensor:
    """Log-probability of each sequence, summed over its scored tokens, `(batch,)`.

    Args:
        inputs: `input_ids` and perhaps `attention_mask`, `(batch, tokens)`.
        labels: `(batch, tokens)`, -100 where a token is not scored; by default all but the first and padding are.
    """
    batch = align_tokens(Batch(inputs=inputs) if labels is None else Batch(inputs=inputs, labels=labels))
    with modes_kept(model):
        logits = full_precision(find_logits(call(model.eval(), inputs)))
    return -cross_entropy(logits, batch.labels).sum(1)


def _require(
    tokens: Tensor, mask: Tensor | None, new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.shape[1] == 0:
        raise InputError(
            f"prompts are ids of shape (batch, tokens), at least one token each, found {tuple(tokens.shape)}"
        )
    if (
        new_tokens < 1
        or temperature < 0
        or (top_k is not None and top_k < 1)
        or not 0 < (1.0 if top_p is None else top_p) <= 1
    ):
        raise InputError(
            f"new_tokens and top_k are at least 1, temperature at least 0, top_p in (0, 1], found {new_tokens}, "
            f"{top_k}, {temperature} and {top_p}"
        )
    if mask is not None and not mask[:, -1].all():
        raise InputError("prompts are padded on the left: the last token of a row is padding here")

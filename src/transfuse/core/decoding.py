"""Decoding: texts that language models continue token by token, alone or several models in step, and their scores.

Models of Hugging Face keep keys and values of what they have read; any other module reads the whole text again at each
token, the last `context` tokens of it where it has an attribute of that name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transfuse.core.batch import Batch, align_tokens
from transfuse.core.errors import InputError, ShapeError
from transfuse.core.outputs import call, eager, find_logits, full_precision, modes_kept
from transfuse.core.placement import device_of
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
    prefixes: Mapping[int, Tensor] | None = None,
    each: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue prompts, in eval mode and without gradients; models are left in the mode they were in.

    Args:
        models: one, or several that read the same tokens in step, each with a cache of its own, with `fuse`.
        tokens: `(batch, n)` ids; shorter prompts are padded on the left, see :func:`left_padded`.
        new_tokens: how many to add to every row.
        mask: `(batch, n)`, 0 at padding; None for none. Padding changes nothing.
        temperature: divides the logits; 0 takes the most likely token.
        top_k, top_p: draw among the k most likely tokens; among the fewest that hold this share of the mass.
        end: a row is finished with this token, and filled up with it.
        generator: of what is drawn; None takes torch's own.
        fuse: called at every step with the logits of all models, in float32, on the device of `tokens`.
        prefixes: by a model's number, tokens `(m,)` that it alone reads before the prompts.
        each: called with every new column, `(batch,)`, for showing text while it is written.

    Returns:
        `(batch, n + new_tokens)`, the prompts first and without prefixes, or less where every row has ended.

    Raises:
        InputError: an argument out of range, a prompt without tokens or padded on the right, a text longer than a model
            can read.
    """
    several = list(models) if isinstance(models, Sequence) else [models]
    if (fuse is None) != (len(several) == 1):
        needs = "one model needs no fuse" if fuse else f"{len(several)} models need a function fuse for their logits"
        raise InputError(f"{needs}: give several models and fuse, or one model")
    real = _require_prompts(tokens, mask)
    _require_settings(new_tokens, temperature, top_k, top_p)
    readers = [Reader(model) for model in several]
    longest = int(real.sum(1).max()) + (new_tokens - 1 if end is None else 0)  # with an end it may be short enough
    before = [(prefixes or {}).get(i, tokens.new_empty(0)).to(tokens.device) for i in range(len(several))]
    for reader, prefix in zip(readers, before, strict=True):
        reader.require_length(longest + len(prefix))
    given = [torch.cat([prefix.expand(len(tokens), -1), tokens], 1) for prefix in before]
    seen = [torch.cat([real.new_ones(len(tokens), len(prefix)), real], 1) for prefix in before]
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    with modes_kept(*several):
        for model in several:
            model.eval()
        for _ in range(new_tokens):
            logits = [reader.read(*text) for reader, *text in zip(readers, given, seen, strict=True)]
            chosen = choose(fuse(logits) if fuse else logits[0], temperature, top_k, top_p, generator)
            if end is not None:
                chosen = chosen.masked_fill(ended, end)
                ended |= chosen == end
            tokens = torch.cat([tokens, chosen[:, None]], 1)
            given, seen = ([column] * len(several) for column in (chosen[:, None], torch.ones_like(ended)[:, None]))
            if each:
                each(chosen)
            if end is not None and bool(ended.all()):
                break
    return tokens


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


def left_padded(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same texts with their padding, wherever it was, on the left: `(tokens, mask)`."""
    order = mask.bool().long().argsort(dim=1, stable=True)
    return tokens.gather(1, order), mask.gather(1, order)


def choose(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A token for each row of logits `(batch, vocabulary)`: `(batch,)`, see :func:`generate`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        share = ordered.softmax(-1)
        beyond = share.cumsum(-1) - share >= top_p  # what stands before a token is enough already
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    probabilities = logits.softmax(-1)
    if generator is not None:
        probabilities = probabilities.to(generator.device)
    return probabilities.multinomial(1, generator=generator).squeeze(1).to(logits.device)


class Reader:
    """One model that reads a batch of texts as they grow; the caller puts it into eval mode.

    Attributes:
        model: as it is called, without a compiled wrapper: texts grow, and each length would be compiled anew.
        caches: whether the model remembers what it has read.
        limit: how many tokens it can read; what has a `context` reads the last ones of any text.

    Raises:
        InputError: the model reads one text and writes another (encoder and decoder).
    """

    def __init__(self, model: nn.Module):
        self.model = eager(model)
        base: Any = getattr(self.model, "get_base_model", None)  # of PEFT
        inner = self.model if base is None else base()
        self._parameters = inspect.signature(type(inner).forward).parameters
        config = getattr(inner, "config", None)
        self._config = config if hasattr(config, "model_type") else None  # one of Hugging Face's
        if getattr(self._config, "is_encoder_decoder", False):
            raise InputError(f"{type(inner).__name__} has an encoder and a decoder: decoding takes decoders alone")
        # Prompts that were learned stand before the text and in the cache; PEFT counts positions there itself.
        learned = getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False)
        self.caches = self._config is not None and "past_key_values" in self._parameters and not learned
        text = None if self._config is None else self._config.get_text_config()
        self.limit: float = getattr(text, "max_position_embeddings", None) or torch.inf
        self._cache: Any = None
        self._tokens: Tensor | None = None
        self._mask: Tensor | None = None

    def require_length(self, length: int) -> None:
        """The model can read so many tokens.

        Raises:
            InputError: it cannot.
        """
        if length > self.limit:
            raise InputError(
                f"{type(self.model).__name__} reads {self.limit} tokens, and these texts grow to {length}: cut the "
                "prompts, or ask for fewer new tokens"
            )

    def read(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Read more tokens of every text.

        Args:
            tokens, mask: `(batch, more)`; what they follow has been read before.

        Returns:
            `(batch, vocabulary)` logits of the token after the last, in float32, on the device of `tokens`.
        """
        seen = mask if self._mask is None else torch.cat([self._mask, mask], 1)
        self._mask = seen
        if seen.shape[1] > self.limit:
            self.require_length(int(seen.sum(1).max()))
        if self.caches:
            return self._forward(tokens, seen, 1, keep=True)[:, -1].to(tokens.device)
        self._tokens = tokens if self._tokens is None else torch.cat([self._tokens, tokens], 1)
        window = slice(-getattr(self.model, "context", seen.shape[1]), None)
        return self._forward(self._tokens[:, window], seen[:, window], 1)[:, -1].to(tokens.device)

    def logits(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits of whole texts, `(batch, tokens, vocabulary)` in float32."""
        return self._forward(tokens, mask, tokens.shape[1]).to(tokens.device)

    def _forward(self, tokens: Tensor, seen: Tensor, count: int, keep: bool = False) -> Tensor:
        """Logits of the last `count` positions of `tokens`, which end a text whose mask is `seen`."""
        device = device_of(self.model)
        tokens, seen = tokens.to(device), seen.to(device)
        if self._config is None:
            return full_precision(find_logits(self._call(tokens, seen)))[:, -count:]
        more: dict[str, Any] = {}
        if "position_ids" in self._parameters and self.caches:
            more["position_ids"] = (seen.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        if "logits_to_keep" in self._parameters:  # the logits of a long prompt would be the largest tensor of all
            more["logits_to_keep"] = count
        if self.caches:
            more |= {"past_key_values": self._cache, "use_cache": keep, "return_dict": True}
        raw = self.model(input_ids=tokens, attention_mask=seen.long(), **more)
        if keep:
            self._cache = raw.past_key_values
        return full_precision(find_logits(raw))[:, -count:]

    def _call(self, tokens: Tensor, seen: Tensor) -> Any:
        if bool(seen.all()):
            return self.model(tokens)
        parameters = self._parameters
        if "attention_mask" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            raise InputError(
                f"{type(self.model).__name__} has no attention_mask, so it cannot tell padding from text: give prompts "
                "of one length, or one at a time"
            )
        return self.model(tokens, attention_mask=seen.long())


def _require_prompts(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Where tokens are real, `(batch, n)` bool."""
    if tokens.dim() != 2 or tokens.is_floating_point() or 0 in tokens.shape:
        raise InputError(
            f"prompts are whole numbers (batch, tokens) with at least one token, found {tokens.dtype} of shape "
            f"{tuple(tokens.shape)}: begin an empty text with the token that begins texts"
        )
    if mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if mask.shape != tokens.shape:
        raise ShapeError(f"mask has shape {tuple(mask.shape)}, tokens {tuple(tokens.shape)}: they must be equal")
    real = mask.bool().to(tokens.device)
    if not bool(real[:, -1].all()) or bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise InputError(
            "prompts are padded on the left, and this mask has padding after a real token, or a row without any: use "
            "left_padded(tokens, mask), or tokenizer.padding_side = 'left'"
        )
    return real


def _require_settings(new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if new_tokens < 1:
        raise InputError(f"new_tokens is {new_tokens}, expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature is {temperature}, expected 0 (the most probable token) or more")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {top_k}, expected at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}, expected more than 0 and at most 1, or None")

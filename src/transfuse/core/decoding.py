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

from transfuse.core.errors import InputError, ShapeError
from transfuse.core.outputs import eager, find_logits, full_precision, modes_kept

Fuse = Callable[[list[Tensor]], Tensor]
"""From the next-token logits of every model, `(batch, its vocabulary)`, to those that the next token is drawn from."""


def generate(
    model: nn.Module,
    tokens: Tensor,
    *,
    new_tokens: int,
    mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue texts, in eval mode and without gradients; the model is left in the mode it was in.

    Args:
        model: gives logits `(batch, tokens, vocabulary)`.
        tokens: `(batch, n)` int64, padded on the left or not at all, see :func:`left_padded`.
        new_tokens: how many to add to every row.
        mask: `(batch, n)`, 1 at real tokens, 0 at padding; None: no padding. Padding changes nothing.
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: draw from the k most probable tokens only.
        top_p: draw from the fewest tokens that hold this share of the probability.
        end: a row that has drawn this token is filled with it.
        generator: of the draws; None takes torch's own.

    Returns:
        `(batch, n + new_tokens)`, the prompts first.

    Raises:
        InputError: an argument out of range, a prompt without tokens or padded on the right, a text longer than the
            model can read.
    """
    return generate_together(
        [model],
        lambda logits: logits[0],
        tokens,
        new_tokens=new_tokens,
        mask=mask,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        end=end,
        generator=generator,
    )


@torch.no_grad()
def generate_together(
    models: Sequence[nn.Module],
    fuse: Fuse,
    tokens: Tensor,
    *,
    new_tokens: int,
    mask: Tensor | None = None,
    prefixes: Mapping[int, Tensor] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    end: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue texts with several models that read the same tokens in step, each with a cache of its own.

    Args:
        models: any number of them.
        fuse: called once per new token with the logits of all models, in float32, on the device of `tokens`.
        prefixes: by a model's number, tokens `(m,)` that this model alone reads before the prompts.
        tokens, new_tokens, mask, temperature, top_k, top_p, end, generator: as for :func:`generate`.

    Returns:
        `(batch, n + new_tokens)`, the prompts first, without prefixes.

    Raises:
        InputError: as :func:`generate`.
    """
    real = _require_prompts(tokens, mask)
    _require_settings(new_tokens, temperature, top_k, top_p)
    before = [(prefixes or {}).get(i, tokens.new_empty(0)) for i in range(len(models))]
    readers = [Reader(model) for model in models]
    longest = int(real.sum(1).max()) + new_tokens - 1
    for reader, prefix in zip(readers, before, strict=True):
        reader.require_length(longest + len(prefix))
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    new = tokens.new_full((len(tokens), new_tokens), 0 if end is None else end)
    with modes_kept(*models):
        for model in models:
            model.eval()
        prompts = [torch.cat([prefix.expand(len(tokens), -1), tokens], 1) for prefix in before]
        masks = [torch.cat([real.new_ones(len(tokens), len(prefix)), real], 1) for prefix in before]
        for i in range(new_tokens):
            logits = fuse([r.read(t, m) for r, t, m in zip(readers, prompts, masks, strict=True)])
            drawn = choose(logits, temperature, top_k, top_p, generator)
            new[:, i] = drawn if end is None else drawn.masked_fill(done, end)
            if end is not None:
                done |= drawn == end
                if bool(done.all()):
                    break
            prompts = [new[:, i : i + 1]] * len(models)
            masks = [torch.ones_like(new[:, i : i + 1], dtype=torch.bool)] * len(models)
    return torch.cat([tokens, new], 1)


@torch.no_grad()
def score(
    model: nn.Module,
    tokens: Tensor,
    continuations: Tensor,
    *,
    mask: Tensor | None = None,
    continuation_mask: Tensor | None = None,
) -> Tensor:
    """How probable a model finds continuations of texts, in one pass over both.

    Args:
        tokens, mask: the texts, as for :func:`generate`.
        continuations: `(batch, m)` int64, padded on the right or not at all; `continuation_mask` is 1 at real tokens.

    Returns:
        `(batch, m)` log-probability of each token of the continuations, in nats; 0 at padding. Sum over a row for the
        probability of a continuation, or take the mean over its tokens to compare some of different length.

    Raises:
        InputError: as :func:`generate`; ShapeError: not one continuation per text.
    """
    real = _require_prompts(tokens, mask)
    if continuations.dim() != 2 or len(continuations) != len(tokens) or not continuations.shape[1]:
        raise ShapeError(
            f"continuations have shape {tuple(continuations.shape)}: expected one of at least one token for each of "
            f"the {len(tokens)} texts, (texts, tokens)"
        )
    counted = torch.ones_like(continuations) if continuation_mask is None else continuation_mask
    if counted.shape != continuations.shape:
        raise ShapeError(f"continuation_mask has shape {tuple(counted.shape)}, continuations {continuations.shape}")
    count = continuations.shape[1]
    whole = torch.cat([tokens, continuations], 1)[:, :-1]
    seen = torch.cat([real, counted.bool()], 1)[:, :-1]
    reader = Reader(model)
    reader.require_length(int(seen.sum(1).max()), windows=False)
    with modes_kept(model):
        model.eval()
        logits = reader.logits(whole, seen, last=count)
    found = logits.log_softmax(-1).gather(-1, continuations[..., None]).squeeze(-1)
    return found.where(counted.bool(), 0)


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
        self._cache: Any = None
        self._tokens: Tensor | None = None
        self._mask: Tensor | None = None

    def require_length(self, length: int, windows: bool = True) -> None:
        """The model can read so many tokens.

        Args:
            windows: whether the last `context` tokens would do.

        Raises:
            InputError: it cannot.
        """
        limit = None
        if self._config is not None:
            limit = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        elif not windows:
            limit = getattr(self.model, "context", None)
        if limit is not None and length > limit:
            raise InputError(
                f"{type(self.model).__name__} reads {limit} tokens, and these texts grow to {length}: cut the prompts, "
                "or ask for fewer new tokens"
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
        if self.caches:
            return self._forward(tokens, seen, last=1, keep=True)[:, -1].to(tokens.device)
        self._tokens = tokens if self._tokens is None else torch.cat([self._tokens, tokens], 1)
        window = slice(-getattr(self.model, "context", seen.shape[1]), None)
        return self._forward(self._tokens[:, window], seen[:, window], last=1)[:, -1].to(tokens.device)

    def logits(self, tokens: Tensor, mask: Tensor, last: int | None = None) -> Tensor:
        """Logits of whole texts, `(batch, tokens, vocabulary)` in float32, or those of the last positions."""
        return self._forward(tokens, mask, last).to(tokens.device)

    def _forward(self, tokens: Tensor, seen: Tensor, last: int | None, keep: bool = False) -> Tensor:
        """Logits of the last positions of `tokens`, which end a text whose mask is `seen`."""
        count = tokens.shape[1] if last is None else last
        device = next((t.device for t in (*self.model.parameters(), *self.model.buffers())), tokens.device)
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
                f"these texts are padded, and {type(self.model).__name__}.forward has no attention_mask to be told so: "
                "give texts of one length, or one at a time"
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

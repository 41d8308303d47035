"""Llamas small enough to be trained on the spot, and text of several kinds for them, read byte by byte."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from proofs.small_text import CONTEXT
from transfuse.datasets import Splits, byte_text
from transfuse.datasets.documents import documents
from transfuse.datasets.messages import messages


def llama(dim: int, depth: int, heads: int, inner: int) -> nn.Module:
    """A Hugging Face Llama over bytes, without tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=dim,
        intermediate_size=inner,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


@cache
def kinds(size: int, held_out: int) -> dict[str, dict[str, Tensor]]:
    """Source code, English documentation, German and French manual pages: windows for train, validate and test."""
    found = {"code": _cut(byte_text(context=CONTEXT), size, held_out)}
    for name, kind in (("docs", "python"), ("german", "man-de"), ("french", "man-fr")):
        found[name] = _cut(documents(kind, context=CONTEXT, size=size, test_size=held_out), size, held_out)
    return found


def french_messages() -> Splits:
    """Messages of programs in French, in windows."""
    splits = messages("fr", context=CONTEXT)
    parts = [{"input_ids": part["foreign"]["input_ids"]} for part in (splits.train, splits.validate, splits.test)]
    return Splits(*parts, name="French messages of programs", task="language-model")


def _cut(splits: Splits, size: int, held_out: int) -> dict[str, Tensor]:
    parts = {"train": (splits.train, size), "validate": (splits.validate, held_out), "test": (splits.test, held_out)}
    return {name: _tokens(part)[:count] for name, (part, count) in parts.items()}


def _tokens(part: Any) -> Tensor:
    tokens: Tensor = part["inputs"]["input_ids"] if isinstance(part, dict) else part.tensors[0]
    return tokens

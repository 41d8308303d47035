"""A causal language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError, ShapeError
from transfuse.models.transformer import Block


class DecoderLM(nn.Module):
    """Causal transformer decoder, pre-norm, with learned positions: `embed_tokens`, `blocks`, `norm`, `head`.

    (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, at toy size.)

    Args:
        vocabulary: number of tokens; 256 reads bytes.
        dim: width of the token stream.
        depth: number of blocks.
        heads: attention heads; divides `dim`.
        context: the longest input, in tokens.
        tie: `head` and `embed_tokens` share one weight.

    Raises:
        InputError: `heads` does not divide `dim`; (in the forward pass) more than `context` tokens.
        ShapeError: (in the forward pass) `attention_mask` and `input_ids` differ in shape.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        context: int = 128,
        tie: bool = True,
    ):
        super().__init__()
        self.context = context
        self.embed_tokens = nn.Embedding(vocabulary, dim)
        self.embed_positions = nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        # Small, so that the tied head starts with nearly equal logits.
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        nn.init.normal_(self.embed_positions.weight, std=0.02)
        if tie:
            self.head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits `(batch, tokens, vocabulary)`; position t predicts token t + 1.

        Args:
            input_ids: `(batch, tokens)`.
            attention_mask: `(batch, tokens)`, 0 at padding, on either side; None: no padding. Real tokens
                neither see padding nor count it in their positions; logits at padding mean nothing.
        """
        if input_ids.shape[1] > self.context:
            raise InputError(
                f"this model reads {self.context} tokens, found {input_ids.shape[1]}: "
                "cut the input, or build the model with a larger context="
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ShapeError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, "
                f"input_ids has {tuple(input_ids.shape)}: they must be equal"
            )
        real = attention_mask.bool()
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        x = self.embed_tokens(input_ids) + self.embed_positions(positions)
        mask = visible(real)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def visible(real: Tensor) -> Tensor:
    """Which token may look at which, `(batch, 1, tokens, tokens)`: real ones that are not later, and itself.

    A padding token sees at least itself, since some attention kernels answer a row without any with NaN.
    """
    tokens = real.shape[1]
    itself = torch.eye(tokens, dtype=torch.bool, device=real.device)
    earlier = torch.ones_like(itself).tril()
    return (earlier & real[:, None, None, :]) | itself

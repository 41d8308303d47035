"""The pre-norm transformer block that the vision transformer and the language model share."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from transfuse.core.errors import InputError


class Attention(nn.Module):
    """Multi-head self-attention, `(batch, tokens, dim)` to the same shape.

    Raises:
        InputError: `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, heads: int):
        if dim % heads:
            raise InputError(f"dim must be a multiple of heads, found dim={dim} and heads={heads}")
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend where `mask` is true; it broadcasts to `(batch, heads, tokens, tokens)`."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(x.transpose(1, 2).flatten(2))

    def matrix(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """How much every token takes of every other, `(batch, heads, tokens, tokens)`; rows sum to 1."""
        query, key, _ = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1)


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each on normalised input and added to the stream."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))

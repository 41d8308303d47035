"""A vision transformer for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transfuse.core.errors import InputError, ShapeError
from transfuse.models.transformer import Block


class ViTTiny(nn.Module):
    """Vision transformer, pre-norm, with a class token: `patch_embed`, `blocks`, `norm`, `head`.

    (Dosovitskiy et al., ICLR 2021, arXiv:2010.11929, at toy size.)

    Args:
        image: height and width of the images `(batch, channels, image, image)`.
        patch: height and width of a patch; divides `image`.
        channels: channels of the images.
        dim: width of the token stream.
        depth: number of blocks.
        heads: attention heads; divides `dim`.
        classes: width of the output, `(batch, classes)`.

    Raises:
        InputError: `patch` does not divide `image`, or `heads` does not divide `dim`.
        ShapeError: (in the forward pass) images of another size.
    """

    def __init__(
        self,
        image: int = 28,
        patch: int = 7,
        channels: int = 1,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        classes: int = 10,
    ):
        if image % patch:
            raise InputError(f"image must be a multiple of patch, found image={image} and patch={patch}")
        super().__init__()
        self.image = image
        self.patch_embed = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (image // patch) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[2:] != (self.image, self.image):
            raise ShapeError(
                f"this model takes images of {self.image}x{self.image} pixels, found a batch of shape "
                f"{tuple(images.shape)}: resize them, or build the model with their size as image="
            )
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))

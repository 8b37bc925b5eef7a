"""Define a small vision transformer for the digits, in the form in which transformers are fine-tuned and merged."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isomerge_fast.demo.model import ResidualBlock
from isomerge_fast.demo.tasks import N_PIXELS

SIDE = 8  # pixels of an image's edge
PATCH = 2  # of a patch's edge
N_PATCHES = (SIDE // PATCH) ** 2
# Of the initial positions. Where strokes lie is what sets the tasks apart: with 0.02, as in CLIP, patches drown it, and
# 150 steps of 128 images leave the base at 0.21 on validation (seed 0, learning rate 2e-3).
POSITION_SCALE = 0.5


class Attention(nn.Module):
    """Return out(softmax(q kᵀ / √d) v) of x `[n, tokens, width]`.

    Four separate matrices, as in checkpoints of language models: each is a tensor of its own to a merge.
    """

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        if width % n_heads:
            raise ValueError(f"width {width} is not a multiple of n_heads {n_heads}")
        self.n_heads = n_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(ResidualBlock):
    """Apply x ← x + attention(norm(x)), then the residual block, to x `[n, tokens, width]`."""

    def __init__(self, width: int, n_heads: int, expansion: int) -> None:
        attention = Attention(width, n_heads)  # draws its weights before the residual block does
        super().__init__(width, expansion)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.attention(self.attention_norm(x)))


class DigitsTransformer(nn.Module):
    """Map pixels `[..., 64]` to unit features `[..., width]`: 2×2 patches, pre-norm blocks, mean over tokens, no head.

    The interface of ``demo.model.DigitsNetwork``, so that its training and scoring serve both.
    """

    def __init__(self, width: int, depth: int, n_heads: int, expansion: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(PATCH * PATCH, width)
        self.position = nn.Parameter(POSITION_SCALE * torch.randn(N_PATCHES, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, n_heads, expansion) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        images = pixels.reshape(-1, N_PIXELS)
        x = self.stem(patches(images)) + self.position
        for block in self.blocks:
            x = block(x)
        features = F.normalize(self.norm(x).mean(-2), dim=-1)
        return features.reshape(*pixels.shape[:-1], features.shape[-1])


def patches(images: Tensor) -> Tensor:
    """Return the 2×2 patches `[n, 16, 4]` of images `[n, 64]`, row by row."""
    return F.unfold(images.reshape(-1, 1, SIDE, SIDE), PATCH, stride=PATCH).mT.contiguous()

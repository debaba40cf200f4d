"""The encoder of `weight_only.py`: nothing but linear layers of real size. Its weights follow from the seed alone.

Peers in environments of their own build it from this file, which therefore imports torch and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# Many outputs, so that one draw of weights says how near to float a quantizer stays.
TOKENS, FEATURES, WIDTH, HEADS, OUTPUTS = 64, 64, 512, 8, 512


def build_encoder(layers: int) -> nn.Module:
    """The encoder in evaluation mode, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder(layers).eval()


class Encoder(nn.Module):
    """Tokens (batch, 64, 64) float32 to embeddings (batch, 512)."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x))).mean(dim=1))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and feed-forward, norm first. Ordinary linear layers throughout: a quantizer that swaps modules, as
    torchao does, would miss the packed weight of nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]

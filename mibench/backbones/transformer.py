"""The small transformer that server branches of the vision transformers are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mibench.backbones.tokens import to_tokens

HEAD_WIDTH = 32
"""Channels of one attention head, about."""
BLOCKS = 2


class TokenBranch(nn.Module):
    """Linear embedding, learned positions, transformer blocks, mean pooling and one linear layer.

    Args:
        tokens: number of tokens N of a share.
        channels: length of one token.
        outputs: length of the reply.
        width: width of the embedding; rounded up to a multiple of the number of heads.
    """

    def __init__(self, tokens: int, channels: int, outputs: int, width: int) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        heads = max(1, width // HEAD_WIDTH)
        width = -(-width // heads) * heads
        self.embed = nn.Linear(channels, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, share: Tensor) -> Tensor:
        """Maps (B, C, h, w), each location a token, or tokens (B, N, C) → (B, outputs)."""
        tokens = to_tokens(share) if share.ndim == 4 else share
        encoded = self.blocks(self.embed(tokens) + self.positions)
        reply: Tensor = self.head(self.norm(encoded).mean(1))
        return reply


def token_branch(share_shape: tuple[int, ...], outputs: int, width: int) -> TokenBranch:
    """Builds a transformer for a share of maps (C, h, w) or of tokens (N, D)."""
    if len(share_shape) == 3:
        channels, height, columns = share_shape
        return TokenBranch(height * columns, channels, outputs, width)
    tokens, channels = share_shape
    return TokenBranch(tokens, channels, outputs, width)

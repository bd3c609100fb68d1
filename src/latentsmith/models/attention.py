"""Attention blocks of the U-Net: the spatial transformer (text to image) and plain self-attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import attention, group_norm, join_heads, split_heads, zero_init


class CrossAttention(nn.Module):
    """Multi-head attention of `query_dim` tokens to a context, or to themselves (`context_dim` None).

    upcast: in float32 whatever the precision, since the scores of Stable Diffusion 2.1 overflow float16.
    """

    def __init__(
        self, query_dim: int, heads: int, context_dim: int | None, fused: bool, dropout: float, upcast: bool = False
    ):
        super().__init__()
        self.heads, self.fused, self.upcast = heads, fused, upcast
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(context_dim or query_dim, query_dim, bias=False)
        self.to_v = nn.Linear(context_dim or query_dim, query_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(query_dim, query_dim), nn.Dropout(dropout))

    def forward(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        context = tokens if context is None else context
        query, key, value = (
            split_heads(project, self.heads) for project in (self.to_q(tokens), self.to_k(context), self.to_v(context))
        )
        if not self.upcast:
            return self.to_out(join_heads(attention(query, key, value, fused=self.fused)))
        with torch.autocast(tokens.device.type, enabled=False):
            mixed = attention(query.float(), key.float(), value.float(), fused=self.fused)
        return self.to_out(join_heads(mixed.to(query.dtype)))


class GEGLU(nn.Module):
    """One half of a projection gated by the exact GELU of the other (Shazeer 2020)."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, tokens: Tensor) -> Tensor:
        value, gate = self.proj(tokens).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward: each on normalised tokens, each added to them."""

    def __init__(self, dim: int, heads: int, context_dim: int, fused: bool, dropout: float, upcast: bool = False):
        super().__init__()
        self.attn1 = CrossAttention(dim, heads, None, fused, dropout, upcast)
        self.ff = FeedForward(dim, dropout)
        self.attn2 = CrossAttention(dim, heads, context_dim, fused, dropout, upcast)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, context: Tensor | None) -> Tensor:
        tokens = tokens + self.attn1(self.norm1(tokens))
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        return tokens + self.ff(self.norm3(tokens))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, which attend to each other and to the text.

    use_linear: project with linear layers on tokens (v2) rather than 1x1 convolutions on pixels (v1).
    """

    def __init__(
        self, channels: int, heads: int, depth: int, context_dim: int, use_linear: bool, fused: bool, dropout: float,
        upcast: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.use_linear = use_linear
        self.norm = group_norm(channels, 32, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if use_linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, heads, context_dim, fused, dropout, upcast) for _ in range(depth)
        )
        self.proj_out = zero_init(nn.Linear(channels, channels) if use_linear else nn.Conv2d(channels, channels, 1))

    def forward(self, hidden: Tensor, context: Tensor | None) -> Tensor:
        height = hidden.shape[2]
        tokens = self.norm(hidden)
        if not self.use_linear:
            tokens = self.proj_in(tokens)
        tokens = tokens.flatten(2).transpose(1, 2)  # (batch, height * width, channels)
        if self.use_linear:
            tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        if self.use_linear:
            return hidden + to_pixels(self.proj_out(tokens), height)
        return hidden + self.proj_out(to_pixels(tokens, height))


class AttentionBlock(nn.Module):
    """Self-attention over pixels, for U-Nets without text (`use_spatial_transformer: false`)."""

    def __init__(self, channels: int, heads: int, fused: bool):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm = group_norm(channels, 32, eps=1e-5)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        pixels = hidden.flatten(2)  # (batch, channels, height * width)
        per_head = self.qkv(self.norm(pixels)).unflatten(1, (self.heads, -1)).transpose(2, 3)
        query, key, value = per_head.chunk(3, dim=-1)  # each (batch, heads, height * width, head_dim)
        mixed = attention(query, key, value, fused=self.fused).transpose(2, 3).flatten(1, 2)
        return hidden + self.proj_out(mixed).view_as(hidden)


def to_pixels(tokens: Tensor, height: int) -> Tensor:
    """Reshape (batch, height * width, channels) to (batch, channels, height, width)."""
    return tokens.transpose(1, 2).unflatten(2, (height, -1))

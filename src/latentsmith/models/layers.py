"""Pieces that more than one network is made of."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters of `module` to zero: a residual branch that starts as the identity (Goyal et al. 2017)."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def group_norm(channels: int, groups: int, eps: float) -> nn.GroupNorm:
    """Make a group normalisation; ValueError where `groups` does not divide `channels`."""
    if channels % groups:
        raise ValueError(f"group norm with {groups} groups cannot divide {channels} channels")
    return nn.GroupNorm(groups, channels, eps=eps)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Return sinusoids of `timesteps` (batch,), whole or fractional: (batch, dim), float32, cosines first.

    Source: Vaswani et al. 2017, section 3.5, in the layout of Ho et al. 2020.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * steps / half)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim - 2 * half))


def attention(query: Tensor, key: Tensor, value: Tensor, *, fused: bool, causal: bool = False) -> Tensor:
    """Return softmax(query key^T / sqrt(head_dim)) value, all (batch, heads, length, head_dim).

    fused: PyTorch's fused kernels (flash attention where the device has it); else the plain product, in float32
    through the softmax. Source: Vaswani et al. 2017, equation 1; Dao et al. 2022 for the fused form.
    """
    if fused:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
    return scores.softmax(dim=-1).to(value.dtype) @ value


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """Reshape (batch, length, heads * head_dim) -> (batch, heads, length, head_dim)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(tokens: Tensor) -> Tensor:
    """Reshape (batch, heads, length, head_dim) -> (batch, length, heads * head_dim)."""
    return tokens.transpose(1, 2).flatten(2)

"""Noise that belongs to one picture: the same at any batch size, in any order, on any device."""

import math

import torch
from torch import Tensor


def noise_of(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """The generator's next unit noise, drawn in float32 on the CPU, as diffusers does with a CPU generator."""
    return torch.randn(shape, generator=generator)


def mixed_noise(own: Tensor, other: Tensor, strength: float) -> Tensor:
    """From `own` at strength 0 to `other` at 1 along the great circle between them, so that it stays unit noise.

    Source: Shoemake 1985, spherical linear interpolation.
    """
    cosine = (own.flatten() @ other.flatten() / (own.norm() * other.norm())).clamp(-1, 1).item()
    angle = math.acos(cosine)
    if math.sin(angle) < 1e-6:
        return own
    return (own * math.sin((1 - strength) * angle) + other * math.sin(strength * angle)) / math.sin(angle)

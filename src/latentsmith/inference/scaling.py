"""The one place that scales latents: the U-Net works on latents of about unit variance, the VAE on its own."""

from torch import Tensor


def to_latents(vae_latents: Tensor, scale_factor: float) -> Tensor:
    """What the VAE gives (unscaled) to what the U-Net works on."""
    return vae_latents * scale_factor


def to_vae_latents(latents: Tensor, scale_factor: float) -> Tensor:
    """What the U-Net works on to what the VAE decodes (unscaled)."""
    return latents / scale_factor

"""The three networks of Stable Diffusion: tensors in, tensors out. Nothing here knows of config, data or trainers."""

from .autoencoder import AutoencoderKL
from .text_encoder import ClipTextEncoder
from .unet import UNetModel

__all__ = ["AutoencoderKL", "ClipTextEncoder", "UNetModel"]

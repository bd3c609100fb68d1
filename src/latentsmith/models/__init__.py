"""The three networks of Stable Diffusion: tensors in, tensors out, of plain nn.Linear and nn.Conv2d.

Files, config and kernels work on them from outside: `checkpoints.load` fills them, `cpu.optimize_for_cpu` swaps layers.
Adapters would replace any nn.Linear or nn.Conv2d in the same way.
"""

from .autoencoder import AutoencoderKL
from .text_encoder import ClipTextEncoder
from .unet import UNetModel

__all__ = ["AutoencoderKL", "ClipTextEncoder", "UNetModel"]

"""Redrawing part of a picture."""

from collections.abc import Callable

from torch import Tensor

from .denoiser import tiled


def inpainting_denoiser(
    denoise: Callable[[Tensor, Tensor | float], Tensor], mask: Tensor, latents: Tensor
) -> Callable[[Tensor, Tensor | float], Tensor]:
    """A denoiser that knows the answer outside the mask: there its clean estimate is `latents`.

    Any sampler then ends at `latents` there, and passes through latents + sigma * noise on the way, so that what is
    redrawn sees its surroundings at its own noise level.
    mask: (batch, 1, height, width) in [0, 1], 1 where to redraw. latents: (batch, channels, height, width), clean.
    """

    def masked(noisy: Tensor, sigma: Tensor | float) -> Tensor:
        known = tiled({"mask": mask.to(noisy), "latents": latents.to(noisy)}, len(noisy))
        return known["latents"] + known["mask"] * (denoise(noisy, sigma) - known["latents"])

    return masked

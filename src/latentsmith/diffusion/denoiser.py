"""A network as a denoiser: the one place that translates sigmas to timesteps.

Samplers speak of noisy = latents + sigma * noise. The network was trained on the same thing scaled to unit variance,
noisy / sqrt(1 + sigma^2) = sqrt_alphas_cumprod * latents + sqrt_one_minus_alphas_cumprod * noise, at a timestep.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .parameterization import canonical_prediction_type, to_denoised, training_target
from .schedule import NoiseSchedule, per_sample


def scales_of(sigma: Tensor | float, like: Tensor) -> tuple[Any, Any]:
    """Return sqrt_alphas_cumprod = 1 / sqrt(1 + sigma^2), and sqrt_one_minus_alphas_cumprod, sigma times that.

    Numbers, or tensors of the shape, dtype and device that multiply `like`.
    """
    if not isinstance(sigma, Tensor):
        scale = 1 / math.sqrt(1 + sigma**2)
        return scale, sigma * scale
    sigma = sigma.double().cpu()
    scales = (1 + sigma**2).rsqrt()
    return per_sample(scales.to(like.dtype), like), per_sample((sigma * scales).to(like.dtype), like)


def tiled(conditioning: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Return the conditioning with its tensors repeated along the batch axis until they serve `batch` samples.

    Raises ValueError where `batch` is no multiple of a tensor's own.
    """

    def tile(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or len(value) == batch:
            return value
        if batch % len(value):
            raise ValueError(f"{name} is for {len(value)} samples, which does not divide the {batch} noisy ones")
        return value.repeat(batch // len(value), *[1] * (value.dim() - 1))

    return {name: tile(name, value) for name, value in conditioning.items()}


class Denoiser:
    """The callable (noisy, sigma, **conditioning) -> denoised, the clean estimate of the latents.

    network: (noisy, timesteps, **conditioning) -> output, of the shape of noisy; timesteps are (batch,) float32, since
        a sampler may ask between two of the schedule's.
    prediction_type: what the network predicts: "epsilon", "v_prediction", "sample", or LDM's eps, v, x0.
    timestep_at: sigma -> timestep, where the schedule's own interpolation is not wanted (SamplingSchedule has one).
    Raises ValueError for an unknown prediction_type.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        schedule: NoiseSchedule,
        prediction_type: str = "epsilon",
        *,
        timestep_at: Callable[[float], float] | None = None,
    ) -> None:
        self.network = network
        self.prediction_type = canonical_prediction_type(prediction_type)
        self.timestep_at = timestep_at or schedule.timestep_at

    def __call__(self, noisy: Tensor, sigma: Tensor | float, **conditioning: Any) -> Tensor:
        """Return the clean estimate.

        noisy: (batch, channels, height, width). sigma: a number, or one per sample, (batch,); above 0.

        conditioning: the network's other inputs (context=...); tensors for fewer samples are repeated.
        """
        return self.from_output(self.output(noisy, sigma, **conditioning), noisy, sigma)

    def output(self, noisy: Tensor, sigma: Tensor | float, **conditioning: Any) -> Tensor:
        """Return the network's own output for the noisy latents, in their dtype."""
        scale, _ = scales_of(sigma, noisy)
        timesteps = self._timesteps(sigma, len(noisy)).to(noisy.device)
        return self.network(noisy * scale, timesteps, **tiled(conditioning, len(noisy))).to(noisy.dtype)

    def from_output(self, output: Tensor, noisy: Tensor, sigma: Tensor | float) -> Tensor:
        """Return the clean estimate that an output for these noisy latents stands for."""
        scales = scales_of(sigma, noisy)
        return to_denoised(self.prediction_type, output, noisy * scales[0], *scales)

    def _timesteps(self, sigma: Tensor | float, batch: int) -> Tensor:
        if isinstance(sigma, Tensor) and sigma.dim():
            return torch.tensor([self.timestep_at(each) for each in sigma.tolist()], dtype=torch.float32)
        return torch.full((batch,), self.timestep_at(float(sigma)), dtype=torch.float32)


def to_output(prediction_type: str, denoised: Tensor, noisy: Tensor, sigma: Tensor | float) -> Tensor:
    """Undo Denoiser.from_output: return a network's output whose clean estimate is `denoised`."""
    scale, noise_scale = scales_of(sigma, noisy)
    noise = (noisy * scale - scale * denoised) / noise_scale
    return training_target(prediction_type, denoised, noise, scale, noise_scale)


def inpainting_denoiser(
    denoise: Callable[[Tensor, Tensor | float], Tensor], mask: Tensor, latents: Tensor
) -> Callable[[Tensor, Tensor | float], Tensor]:
    """Return a denoiser whose clean estimate outside the mask is `latents`, whatever the network's.

    Any sampler then ends at `latents` there, and passes through latents + sigma * noise on the way, so that what is
    generated sees its surroundings at its own sigma.
    mask: (batch, 1, height, width) in [0, 1], 1 where to generate. latents: (batch, channels, height, width), clean.
    """

    def masked(noisy: Tensor, sigma: Tensor | float) -> Tensor:
        fixed = tiled({"mask": mask.to(noisy), "latents": latents.to(noisy)}, len(noisy))
        blended = fixed["latents"] + fixed["mask"] * (denoise(noisy, sigma) - fixed["latents"])
        return torch.where(fixed["mask"] > 0, blended, fixed["latents"])  # a product with 0 would keep NaN

    return masked
